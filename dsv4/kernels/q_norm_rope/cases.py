"""Cases of q_norm_rope."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.case import BF16_ULP, DTYPES, EPS, F32_ULP, Case, Maker, Tolerances, bits, pairs
from dsv4.kernels.q_norm_rope.q_norm_rope import q_norm_rope
from dsv4.kernels.q_norm_rope.q_norm_rope_ref import q_norm_rope_ref


def tolerance(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    y = expected[0]  # in BF16 the mean may fall on the other side: root and product each one unit away
    return [pairs(y) * (3 * BF16_ULP if y.dtype == torch.bfloat16 else 8 * F32_ULP)]


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    shapes = [(3, 4, 96, 64), (1, 64, 512, 64), (2, 3, 14, 6), (0, 64, 512, 64)]
    shapes += [] if quick else [(1, 128, 512, 64), (64, 64, 512, 64), (64, 64, 128, 64), (4096, 64, 512, 64)]
    for dtype in DTYPES:
        for t, heads, n, dims in shapes:
            args = (make.normal(t, heads, n, dtype=dtype), make.cis(t, dims), EPS)
            yield Case("q_norm_rope", f"[{t}, {heads}, {n}]", dtype, q_norm_rope, q_norm_rope_ref, args, tolerance)
    # Sums of rounded squares of 8-bit integers are exact in any order, so every rounding of the twin must be met.
    whole, still = make.integers(-200, 201, 4, 64, 512).bfloat16(), torch.ones(4, 32, dtype=torch.complex64)
    args = (whole, still.to(make.device), EPS)
    yield Case("q_norm_rope", "exact sums", "bf16", q_norm_rope, q_norm_rope_ref, args, bits)
