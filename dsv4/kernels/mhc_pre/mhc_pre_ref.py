"""Twin of mhc_pre: the mixes of a site, Sinkhorn, and the collapsed input."""

from typing import Any

import torch
from torch import Tensor

from dsv4.quant.scalars import scalar


def mixes_ref(v: Tensor, fn: Tensor, eps: float) -> Tensor:
    """v [T, M*D] f32 -> (fn . v) * rsqrt(mean(v^2) + eps) [T, rows of fn]: the scale is applied after the product."""
    return torch.nn.functional.linear(v, fn).mul_(v.square().mean(-1, keepdim=True).add_(scalar(eps)).rsqrt_())


_STEPS: dict[tuple[int, float], list[Any]] = {}


def _steps(streams: int, eps: float) -> list[Any]:
    """The sums of the column step and of the row step as matrices for [c, flat | 1]: they add eps and keep the 1."""
    if (streams, eps) not in _STEPS:
        place = torch.arange(streams**2)
        for group in (place % streams, place // streams):
            sums = torch.nn.functional.pad((group.unsqueeze(-1) == group).float(), (0, 1, 0, 1), value=eps)
            sums[:-1, -1], sums[-1, -1] = 0, 1
            _STEPS.setdefault((streams, eps), []).append(sums.numpy())
    return _STEPS[streams, eps]


def _sinkhorn_of_one(logits: Tensor, iters: int, eps: float) -> Tensor:
    """The same for T = 1 on a CPU, bit for bit: its cost are the calls, and NumPy's cost a third of PyTorch's."""
    streams = logits.shape[-1]
    down, across = _steps(streams, eps)
    padded = torch.ones(2, streams**2 + 1)  # two rows make it a matrix product, which adds in order; the second is idle
    c = padded[:1, :-1].view_as(logits)
    torch.softmax(logits, dim=-1, out=c).add_(scalar(eps))
    entries = padded.numpy()
    sums = entries.dot(down)
    entries /= sums
    for _ in range(iters - 1):
        entries.dot(across, sums)
        entries /= sums
        entries.dot(down, sums)
        entries /= sums
    return c


def sinkhorn_ref(logits: Tensor, iters: int, eps: float) -> Tensor:
    """[T, M, M] logits -> doubly stochastic: row softmax, then `iters` column steps with row steps between."""
    if len(logits) == 1 and logits.is_cpu and logits.dtype == torch.float32 and logits.shape[-1] == 4:
        return _sinkhorn_of_one(logits, iters, eps)
    # Sums are products with ones, into one buffer, and eps is a tensor: at few rows all of this is call overhead.
    ones, floor = torch.ones_like(logits), torch.full_like(logits, eps)
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
    pre = torch.sigmoid(z[:, :streams].contiguous()).add_(scalar(hc_eps))
    post = torch.sigmoid(z[:, streams : 2 * streams].contiguous()).mul_(scalar(2.0))
    comb = sinkhorn_ref(z[:, 2 * streams :].view(-1, streams, streams), sinkhorn_iters, hc_eps)
    x = (h32 * pre.unsqueeze(-1)).sum(-2).to(h.dtype)
    return x, post, comb
