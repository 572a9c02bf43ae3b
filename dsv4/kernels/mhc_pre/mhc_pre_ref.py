"""Twin of mhc_pre: the mixes of a site, Sinkhorn, and the collapsed input."""

import torch
from torch import Tensor


def mixes_ref(v: Tensor, fn: Tensor, eps: float) -> Tensor:
    """v [T, M*D] f32 -> (fn . v) * rsqrt(mean(v^2) + eps) [T, rows of fn]: the scale is applied after the product."""
    return torch.nn.functional.linear(v, fn).mul_(v.square().mean(-1, keepdim=True).add_(eps).rsqrt_())


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
    h32 = h.float()
    z = mixes_ref(h32.flatten(-2), fn, norm_eps).mul_(scale).add_(base)
    # A CPU's sigmoid of spaced-out numbers differs in the last bit from that of adjacent ones, which the model has.
    pre = torch.sigmoid(z[:, :streams].contiguous()).add_(hc_eps)
    post = torch.sigmoid(z[:, streams : 2 * streams].contiguous()).mul_(2)
    comb = sinkhorn_ref(z[:, 2 * streams :].view(-1, streams, streams), sinkhorn_iters, hc_eps)
    x = (h32 * pre.unsqueeze(-1)).sum(-2).to(h.dtype)
    return x, post, comb
