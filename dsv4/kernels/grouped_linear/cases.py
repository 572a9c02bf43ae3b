"""Cases of grouped_linear: wo_a of Flash and Pro in every format, ragged and odd sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.case import Case, Maker, Tolerances, nbytes
from dsv4.kernels.grouped_linear.grouped_linear import grouped_linear
from dsv4.kernels.grouped_linear.grouped_linear_ref import grouped_linear_ref
from dsv4.kernels.grouped_linear.operand import grouped_operand
from dsv4.kernels.linear.cases import accumulation, activations, weight
from dsv4.quant.activations import Act, treat

KINDS: list[tuple[str, Act]] = [("nvfp4", "bf16"), ("nvfp4", "nvfp4"), ("fp8", "fp8"), ("bf16", "bf16")]


def tolerance(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    o, operand = args
    groups = operand.groups
    seen = treat(o.unflatten(-1, (len(groups.values), -1)), operand.treatment).abs()
    magnitudes = torch.einsum("tgk,grk->tgr", seen, groups.values.float().abs())
    if groups.alpha is not None:
        magnitudes *= groups.alpha
    return [accumulation(seen.shape[-1], expected[0], magnitudes.flatten(1))]


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    sizes = [(1, 4, 64, 256), (5, 2, 24, 208), (9, 3, 40, 128), (70, 4, 64, 1024), (200, 2, 40, 128)]
    if not quick:
        sizes += [(rows, 8, 1024, 4096) for rows in (1, 2, 8, 9, 16, 64, 300, 4096)] + [
            (rows, 16, 1024, 4096) for rows in (1, 8)
        ]
    for rows, count, rank, k in sizes:
        for format, act in KINDS:
            operand = grouped_operand(weight(make, format, count * rank, k), count, act=act)
            o = activations(make, rows, count * k)
            moved = operand.nbytes + nbytes(o) + rows * count * rank * 2
            name = f"{format} act={act} [{rows}, {count} x {k}] -> {count} x {rank}"
            args, twin = (o, operand), grouped_linear_ref
            yield Case("grouped_linear", name, "bf16", grouped_linear, twin, args, tolerance, moved=moved)
