"""Twin of mhc_head."""

import torch
from torch import Tensor

from dsv4.kernels.mhc_pre.mhc_pre_ref import mixes_ref


def mhc_head_ref(h: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, hc_eps: float, norm_eps: float) -> Tensor:
    pre = torch.sigmoid(mixes_ref(h, fn, norm_eps) * scale + base) + hc_eps
    return (pre.unsqueeze(-1) * h).sum(-2).to(h.dtype)
