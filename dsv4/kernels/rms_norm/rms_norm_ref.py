"""Twin of rms_norm."""

import torch
from torch import Tensor

from dsv4.quant.scalars import scalar


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return torch.mul(x32, x32.square().mean(-1, keepdim=True).add_(scalar(eps)).rsqrt_()).mul_(weight).to(x.dtype)
