"""Twin of rope: complex rotation of adjacent channel pairs, in place."""

import torch
from torch import Tensor


def rope_ref(x: Tensor, cis: Tensor) -> Tensor:
    rope_dims = 2 * cis.shape[-1]
    tail = x[..., x.shape[-1] - rope_dims :]
    fresh = tail.to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # complex views need even strides
    pairs = torch.view_as_complex(fresh.unflatten(-1, (-1, 2)))
    pairs.mul_(cis if x.dim() == cis.dim() else cis.unsqueeze(-2))
    tail.copy_(fresh)
    return x
