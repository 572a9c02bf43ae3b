"""Cases of index_query: the indexer's heads of V4 and of few-headed models; exact sums must give the twin's bits."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.case import F32_ULP, Case, Maker, Tolerances, bits, pairs, rounding
from dsv4.kernels.index_query.index_query import index_query
from dsv4.kernels.index_query.index_query_ref import index_query_ref

WIDTH, ROPE = 128, 64


def turned(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    y = expected[0]
    moved = (torch.arange(WIDTH, device=y.device) >= WIDTH - ROPE).double()
    return [(rounding(y) + 2 * F32_ULP * pairs(y)) * moved]


def one_step(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    """A transform that is off by its last bit moves a channel by at most one E2M1 step, 2/3 of its group's largest
    value, and that scale by at most a factor of 2.
    """
    groups = expected[0].double().abs().unflatten(-1, (-1, 32))
    return [(groups.amax(-1, keepdim=True) * 4 / 3).expand_as(groups).flatten(-2)]


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    shapes = [(3, 64), (5, 8), (3, 3), (0, 64)] + ([] if quick else [(1, 64), (4, 64), (64, 64), (1024, 64)])
    for rows, heads in shapes:
        q, cis = make.normal(rows, heads, WIDTH, dtype="bf16", scale=3), make.cis(rows, ROPE)
        for quantize, tolerance in ((True, one_step), (False, turned)):
            name = f"[{rows}, {heads}, {WIDTH}]{'' if quantize else ' turned only'}"
            kwargs = {"quantize": quantize}
            yield Case("index_query", name, "bf16", index_query, index_query_ref, (q, cis), tolerance, kwargs)
    # Small integers and quarter turns: RoPE and all 128 terms of the transform are exact in any order.
    whole = make.integers(-15, 16, 64, 64, WIDTH).bfloat16()
    whole[0, 0], whole[0, 1, 32:] = 0, 0
    quarter = torch.tensor([1, 1j, -1, -1j], dtype=torch.complex64, device=make.device)
    args = whole, quarter[make.integers(0, 4, 64, ROPE // 2)]
    yield Case("index_query", "exact sums", "bf16", index_query, index_query_ref, args, bits, {"quantize": True})
