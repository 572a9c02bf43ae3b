"""What an entry may come out as when float32 sums are added in another order: intervals through every rounding.

Each function takes and gives (low, high), float64, of all values that a kernel may hold at that point. Rounding is
monotone, so an interval's ends, rounded, bound what comes of it; where no boundary is near they fall together, and the
tolerance is zero: bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsv4.quant import fp8, mxfp4
from dsv4.quant.formats import e2m1_decode, e2m1_encode, pow2_ceil
from dsv4.quant.hadamard import hadamard

Interval = tuple[Tensor, Tensor]
UNIT = 2.0**-24  # of a float32 rounding
NORM = 2.0**-19  # relative: a sum of up to 1024 squares in any order, its root and two products


def spread(x: Tensor, slack: Tensor | float) -> Interval:
    return x - slack, x + slack


def rounded(x: Interval, dtype: torch.dtype) -> Interval:
    low, high = (end.float().to(dtype).double() for end in x)
    return low, high


def _hull(*values: Tensor) -> Interval:
    stacked = torch.stack(values)
    return stacked.amin(0), stacked.amax(0)


def _magnitudes(x: Interval) -> Interval:
    low, high = x[0].abs(), x[1].abs()
    crosses = (x[0] <= 0) & (x[1] >= 0)
    return torch.minimum(low, high).masked_fill(crosses, 0.0), torch.maximum(low, high)


def norm(x: Interval, weight: Tensor, eps: float, dtype: torch.dtype) -> Interval:
    least, most = (m.square().mean(-1, keepdim=True) for m in _magnitudes(x))
    roots = (most + eps).rsqrt() * (1 - NORM), (least + eps).rsqrt() * (1 + NORM)
    return rounded(_hull(*(end * root * weight.double() for end in x for root in roots)), dtype)


def rope(x: Interval, cis: Tensor, dtype: torch.dtype) -> Interval:
    dims, turn = 2 * cis.shape[-1], cis.to(torch.complex128)
    plain = x[0].shape[-1] - dims
    ends = [end[..., plain:].unflatten(-1, (-1, 2)) for end in x]
    middle, radius = (ends[0] + ends[1]) / 2, (ends[1] - ends[0]) / 2
    turned = torch.view_as_real(torch.view_as_complex(middle.contiguous()) * turn)
    cos, sin = turn.real.abs().unsqueeze(-1), turn.imag.abs().unsqueeze(-1)
    slack = radius * cos + radius.flip(-1) * sin + 4 * UNIT * (middle.abs() + radius).sum(-1, keepdim=True)
    tail = rounded(spread(turned, slack), dtype)
    low, high = (torch.cat([end[..., :plain], part.flatten(-2)], -1) for end, part in zip(x, tail, strict=True))
    return low, high


def _quantised(
    x: Interval, group: int, scale: Callable[[Tensor], Tensor], keep: Callable[[Tensor], Tensor]
) -> Interval:
    low, high = (end.float().unflatten(-1, (-1, group)) for end in x)
    scales = [scale(m.amax(-1, keepdim=True)) for m in _magnitudes((low, high))]
    values = _hull(*((keep(end / s) * s).double() for end in (low, high) for s in scales))
    return values[0].flatten(-2), values[1].flatten(-2)


def entry(x: Interval, rope_dims: int) -> Interval:
    """E4M3 in groups of 64 of the channels before the rotated ones."""
    plain = x[0].shape[-1] - rope_dims

    def scale(amax: Tensor) -> Tensor:
        return pow2_ceil(amax.clamp(min=fp8.ACT_AMAX_FLOOR) * (1 / 448))

    def keep(y: Tensor) -> Tensor:
        return y.to(torch.float8_e4m3fn).float()

    kept = _quantised((x[0][..., :plain], x[1][..., :plain]), 64, scale, keep)
    low, high = (torch.cat([part, end[..., plain:]], -1) for part, end in zip(kept, x, strict=True))
    return low, high


def index_key(x: Interval, dtype: torch.dtype) -> Interval:
    """Hadamard, then E2M1 in groups of 32."""
    n = x[0].shape[-1]
    matrix = hadamard(torch.eye(n, device=x[0].device)).sign().double() * n**-0.5
    middle, radius = (x[0] + x[1]) / 2, (x[1] - x[0]) / 2
    slack = radius @ matrix.abs() + 2 * n.bit_length() * UNIT * (middle.abs() @ matrix.abs())
    return _quantised(
        rounded(spread(middle @ matrix, slack), dtype), 32, mxfp4.group_scale, lambda y: e2m1_decode(e2m1_encode(y))
    )


def tolerance(x: Interval, expected: Tensor) -> Tensor:
    """How far from what the twin gave any value of the interval is."""
    found = expected.double()
    return torch.maximum((x[1] - found).abs(), (found - x[0]).abs())
