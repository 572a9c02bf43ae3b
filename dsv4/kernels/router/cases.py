"""Cases of router: score layers, ties, hash layers."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.case import F32_ULP, Case, Maker, Tolerances, nbytes
from dsv4.kernels.router.router import router
from dsv4.kernels.router.router_ref import router_ref


def tolerance(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    return [None, expected[1].double().abs() * 8 * F32_ULP]


def case(name: str, how: dict[str, Any], logits: Tensor, bias: Tensor | None, table: Tensor | None, t: Tensor) -> Case:
    chosen = len(logits) * how["topk"] * 12  # ids and weights
    moved = nbytes(logits, t) + chosen + (0 if table is None else len(logits) * how["topk"] * 8)
    return Case("router", name, "f32", router, router_ref, (logits, bias, table, t), tolerance, how, moved=moved)


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    sizes = [(3, 256, 6), (5, 7, 3), (0, 256, 6)]
    sizes += [] if quick else [(1, 256, 6), (1, 384, 6), (64, 256, 6), (64, 384, 6), (8192, 384, 6)]
    for rows, experts, topk in sizes:
        tokens, how = make.integers(0, 1000, rows), {"topk": topk, "route_scale": 1.5}
        logits, bias = make.normal(rows, experts, scale=4), make.normal(experts)
        name = f"[{rows}, {experts}] top {topk}"
        yield case(name, how, logits, bias, None, tokens)
        ties = make.integers(0, 3, rows, experts).float()  # three values only: the order among equals decides
        yield case(f"{name} ties", how, ties, torch.zeros_like(bias), None, tokens)
        yield case(f"{name} hash", how, logits, None, make.integers(0, experts, 1000, topk), tokens)
    wide, how = make.normal(9, 300)[:, 20:276], {"topk": 6, "route_scale": 2.5}
    yield case("[9, 256] of [9, 300]", how, wide, None, None, make.integers(0, 9, 9))
