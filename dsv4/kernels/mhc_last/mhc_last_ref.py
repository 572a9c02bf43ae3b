"""Twin of mhc_last: the two ops it joins."""

from typing import Any

from torch import Tensor

from dsv4.kernels.mhc_head.mhc_head_ref import mhc_head_ref
from dsv4.kernels.mhc_post.mhc_post_ref import mhc_post_ref


def mhc_last_ref(
    y: Tensor,
    h: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    *,
    hc_eps: float,
    norm_eps: float,
    peers: Any = None,
) -> tuple[Tensor, Tensor]:
    if peers is not None:
        y = peers.total(y).to(h.dtype)
    h = mhc_post_ref(y, h, post, comb)
    return h, mhc_head_ref(h, fn, base, scale, hc_eps=hc_eps, norm_eps=norm_eps)
