"""Twin of q_norm_rope."""

import torch
from torch import Tensor

from dsv4.kernels.rope.rope_ref import rope_ref


def q_norm_rope_ref(q: Tensor, cis: Tensor, eps: float) -> Tensor:
    q = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + eps)
    return rope_ref(q, cis)
