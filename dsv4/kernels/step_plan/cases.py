"""Cases of step_plan: row numbers are bits; sine and cosine may be two float32 units from torch's."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.case import F32_ULP, Case, Maker, Tolerances, nbytes
from dsv4.kernels.step_plan.rows import Kind
from dsv4.kernels.step_plan.step_plan import step_plan
from dsv4.kernels.step_plan.step_plan_ref import step_plan_ref

SLOTS = 70
CSA, HCA = Kind(4, True, 1, 256, 0), Kind(128, False, 1, 8, 512)  # 65536 tokens
SHORT = Kind(4, True, 1, 2, 128), Kind(16, False, 0, 3, 100)  # all entries of 512 tokens, and part of a page


def tolerance(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    return [None if y.dtype == torch.int64 else torch.full_like(y, 2 * F32_ULP) for y in expected]


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    def case(name: str, kinds: tuple[Kind, ...], positions: Tensor, padding: int, half: int) -> Case:
        rows = len(positions)
        numbers = torch.arange(rows, device=make.device)
        slots = torch.where(numbers < rows - padding, (numbers * 37) % SLOTS, -1)
        freqs = make.uniform(2, half) ** 4
        tables = tuple(make.integers(0, 1 << 20, SLOTS, kind.pages + 3) for kind in kinds)
        # Read: a page number per 64 visible entries, at most all; written: every result.
        written = rows * (128 + 2 + 8 * half) + sum(rows * (5 + k.items + k.pages + k.width + half) for k in kinds)
        args = (slots, positions, freqs, tables, kinds, 128)
        moved = 8 * written + nbytes(slots, positions, freqs)
        return Case("step_plan", name, "i64", step_plan, step_plan_ref, args, tolerance, moved=moved)

    edges = [0, 3, 4, 7, 127, 128, 129, 255, 256, 511]
    places = torch.tensor(edges, device=make.device)
    yield case("edges", (CSA, HCA), places, 0, 32)
    yield case("edges, short", SHORT, places.clamp(max=303), 3, 8)
    yield case("windows only", (), places, 1, 32)
    yield case("one row", (HCA,), places[5:6], 0, 32)
    yield case("padding alone", (CSA, HCA), places, len(edges), 32)
    yield case("no rows", (CSA, HCA), places[:0], 0, 32)
    if not quick:
        yield case("1 row of 65536", (CSA, HCA), make.integers(65535, 65536, 1), 0, 32)
        yield case("64 rows below 65536", (CSA, HCA), make.integers(0, 65536, 64), 7, 32)
        million = Kind(4, True, 1, 4096, 0), Kind(128, False, 1, 128, 8192)
        yield case("64 rows below 1048576", million, make.integers(0, 1 << 20, 64), 0, 32)
