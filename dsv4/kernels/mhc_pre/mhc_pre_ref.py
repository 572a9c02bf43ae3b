"""Twin of mhc_pre: the mixes of a site, Sinkhorn, and the collapsed input."""

import torch
from torch import Tensor


def mixes_ref(h: Tensor, fn: Tensor, eps: float) -> Tensor:
    """(fn . vec(h)) * rsqrt(mean(vec(h)^2) + eps) in float32: the scale is applied after the product. -> [T, rows of
    fn]
    """
    v = h.flatten(-2).float()
    return torch.nn.functional.linear(v, fn) * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)


def sinkhorn_ref(logits: Tensor, iters: int, eps: float) -> Tensor:
    """[T, M, M] logits -> doubly stochastic: row softmax, then `iters` column steps with row steps between."""
    # Sums are products with ones, into one buffer, and eps is a tensor: at one row all of this is call overhead.
    ones, floor = torch.ones_like(logits), logits.new_full(logits.shape[-2:], eps)
    c = torch.softmax(logits, dim=-1).add_(floor)
    sums = torch.empty_like(c)
    c.div_(torch.baddbmm(floor, ones, c, out=sums))
    for _ in range(iters - 1):
        c.div_(torch.baddbmm(floor, c, ones, out=sums))
        c.div_(torch.baddbmm(floor, ones, c, out=sums))
    return c


def mhc_pre_ref(
    h: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, sinkhorn_iters: int, hc_eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    streams = h.shape[-2]
    z = mixes_ref(h, fn, norm_eps) * scale + base
    pre, post = torch.split_with_sizes(torch.sigmoid(z[:, : 2 * streams]), (streams, streams), -1)
    pre, post = pre + hc_eps, 2 * post
    comb = sinkhorn_ref(z[:, 2 * streams :].unflatten(-1, (streams, streams)), sinkhorn_iters, hc_eps)
    x = (pre.unsqueeze(-1) * h).sum(-2).to(h.dtype)
    return x, post, comb
