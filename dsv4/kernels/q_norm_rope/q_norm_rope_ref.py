"""Twin of q_norm_rope."""

import torch
from torch import Tensor

from dsv4.kernels.rope.rope_ref import rope_ref


def q_norm_rope_ref(q: Tensor, cis: Tensor, eps: float) -> Tensor:
    mean = q.square().float().mean(-1, keepdim=True).to(q.dtype)  # a BF16 mean on CPU would round its partial sums too
    return rope_ref(q * torch.rsqrt((mean + eps).float()).to(q.dtype), cis)
