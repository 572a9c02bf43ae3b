"""Twin of mhc_seam: the three ops it joins."""

from typing import Any

from torch import Tensor

from dsv4.kernels.mhc_post.mhc_post_ref import mhc_post_ref
from dsv4.kernels.mhc_pre.mhc_pre_ref import mhc_pre_ref
from dsv4.kernels.rms_norm.rms_norm_ref import rms_norm_ref


def mhc_seam_ref(
    y: Tensor,
    h: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    weight: Tensor,
    *,
    sinkhorn_iters: int,
    hc_eps: float,
    norm_eps: float,
    peers: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if peers is not None:
        y = peers.total(y).to(h.dtype)
    h = mhc_post_ref(y, h, post, comb)
    x, post, comb = mhc_pre_ref(h, fn, base, scale, sinkhorn_iters=sinkhorn_iters, hc_eps=hc_eps, norm_eps=norm_eps)
    return h, rms_norm_ref(x, weight, norm_eps), post, comb
