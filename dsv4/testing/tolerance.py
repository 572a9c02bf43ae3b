"""What "equal" means in comparisons that are not bit for bit: each bound with its measure and its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

#: Largest relative error of one rounding to nearest: half a unit in the last place.
BF16_ROUNDING = 2.0**-8
FLOAT32_ROUNDING = 2.0**-24


@dataclass(frozen=True)
class Bound:
    """A limit on `deviation`, and why it is neither smaller nor larger."""

    limit: float
    reason: str


FLOAT32_LOGITS = Bound(
    1e-5,
    "float32 against float64 or another float32 order of summation, up to five layers and 300 tokens: 1.4e-6 measured. "
    "A Sinkhorn loop one iteration short already shows as 3e-5.",
)
QUANTISED_LOGITS = Bound(
    2e-3,
    "trained-in quantisation on, dtype float32: 5e-7 measured where every rounding takes the same side. There is room "
    "for one E4M3 value of the last layer on the other side (a step of 1/16 in one of hundreds of inputs), and for "
    "nothing systematic: one quantiser left out shows as 3e-2.",
)
FOLLOWED_LOGITS = Bound(
    1e-5,
    "as QUANTISED_LOGITS with the comparison following the engine's side of every rounding: what is left is float32 "
    "summation, 2e-6 measured over four layers and 300 tokens.",
)


def deviation(found: Any, expected: Any) -> float:
    """max |found - expected| / max(1, max |expected|) in float64; infinite for NaN, Inf or different shapes."""
    a, b = (torch.as_tensor(x).detach().cpu().double() for x in (found, expected))
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        return float("inf")
    if a.numel() == 0:
        return 0.0
    return float((a - b).abs().max() / b.abs().max().clamp(min=1))


def dot_error(
    exact: torch.Tensor, magnitudes: torch.Tensor, terms: int, *, roundings: int = 0, output: float = 0.0
) -> torch.Tensor:
    """Bound on |computed - exact| of dot products accumulated in float32 in any order and then rounded once.

    exact, magnitudes: the sum of the products and of their absolute values, float64. terms: products per sum; summing
    errs by at most (terms - 1) * 2^-24 * magnitudes to first order. roundings: further float32 roundings that a product
    or the sum goes through (scales folded in). output: relative error of the final rounding, BF16_ROUNDING or 0.
    """
    summed = magnitudes * ((terms - 1 + roundings) * FLOAT32_ROUNDING * 1.01)  # 1%: second order, terms < 2^16
    return summed * (1 + output) + exact.abs() * output
