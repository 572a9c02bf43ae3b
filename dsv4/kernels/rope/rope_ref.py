"""Twin of rope: complex rotation of adjacent channel pairs, in place."""

import torch
from torch import Tensor


def rope_ref(x: Tensor, cis: Tensor) -> Tensor:
    rope_dims = 2 * cis.shape[-1]
    tail = x[..., x.shape[-1] - rope_dims :]
    turned = tail.to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # complex views need even strides
    turned.view(torch.complex64).mul_(cis if x.dim() == cis.dim() else cis.unsqueeze(-2))
    tail.copy_(turned)
    return x
