"""Twin of rope: complex rotation of adjacent channel pairs."""

import torch
from torch import Tensor


def rope_ref(x: Tensor, cis: Tensor, *, inverse: bool = False) -> Tensor:
    rope_dims = 2 * cis.shape[-1]
    keep, rotate = x.split([x.shape[-1] - rope_dims, rope_dims], dim=-1)
    if inverse:
        cis = cis.conj()
    if x.dim() > cis.dim():
        cis = cis.unsqueeze(-2)
    fresh = rotate.to(
        torch.float32, copy=True, memory_format=torch.contiguous_format
    )  # complex views need even strides
    pairs = torch.view_as_complex(fresh.unflatten(-1, (-1, 2)))
    rotated = torch.view_as_real(pairs * cis).flatten(-2)
    return torch.cat([keep, rotated.to(x.dtype)], dim=-1)
