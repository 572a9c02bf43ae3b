"""Cases of rope: it turns in place, and channels that do not turn keep their bits."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.case import DTYPES, F32_ULP, Case, Maker, Tolerances, nbytes, pairs, rounding
from dsv4.kernels.rope.rope import rope
from dsv4.kernels.rope.rope_ref import rope_ref


def tolerance(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    y, dims = expected[0], 2 * args[1].shape[1]
    moved = (torch.arange(y.shape[-1], device=y.device) >= y.shape[-1] - dims).double()
    return [(rounding(y) + 2 * F32_ULP * pairs(y)) * moved]


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    shapes = [(3, 4, 96, 64), (1, 64, 512, 64), (2, 3, 14, 6), (0, 64, 512, 64)]
    shapes += [] if quick else [(1, 128, 512, 64), (64, 64, 512, 64), (64, 64, 128, 64), (4096, 64, 512, 64)]
    for dtype in DTYPES:
        inputs = [
            (f"[{t}, {heads}, {n}]", make.normal(t, heads, n, dtype=dtype), make.cis(t, dims))
            for t, heads, n, dims in shapes
        ]
        inputs.append(("[5, 512]", make.normal(5, 512, dtype=dtype), make.cis(5, 64)))
        for name, x, cis in inputs:
            tail = x[..., -2 * cis.shape[1] :]
            yield Case(
                "rope",
                name,
                dtype,
                rope,
                rope_ref,
                (x, cis),
                tolerance,
                in_place=(0,),
                returns=False,
                moved=2 * nbytes(tail) + nbytes(cis),
            )
