"""Twin of mhc_head."""

import torch
from torch import Tensor

from dsv4.kernels.mhc_pre.mhc_pre_ref import mixes_ref
from dsv4.quant.scalars import scalar


def mhc_head_ref(h: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, hc_eps: float, norm_eps: float) -> Tensor:
    h32 = h.float()
    pre = torch.sigmoid(mixes_ref(h32.flatten(-2), fn, norm_eps).mul_(scale).add_(base)).add_(scalar(hc_eps))
    return (h32 * pre.unsqueeze(-1)).sum(-2).to(h.dtype)
