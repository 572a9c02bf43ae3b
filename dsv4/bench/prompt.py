"""Where a prompt goes: its calls of ops, the sums over ranks and the host's plan, each from the device's point of view.

A call lasts from when the device has done all in front of it to when it has done the call. Where the host is slow a
device waits inside a call, or between two; how far the host was ahead says which calls that concerns.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import dsv4.layers.moe
import dsv4.model
from dsv4.bench.flop import GEMMS, flop_of
from dsv4.bench.record import Call, recording
from dsv4.bench.report import rate, speed
from dsv4.bench.timing import Launch, Timer
from dsv4.bench.traffic import storages, work_of
from dsv4.bench.waterfall import Bar
from dsv4.kernels.op import REGISTRY
from dsv4.kvcache import KVCache
from dsv4.model import Model
from dsv4.parallel.mesh import Mesh

REST, WHOLE = "between calls", "prompt"
BESIDE: dict[str, tuple[Any, str]] = {  # what is no op
    "host: plan": (dsv4.model, "make_plan"),
    "ranks: sum": (Mesh, "all_reduce"),
    "ranks: sum of own rows": (Mesh, "add_rows"),
    "ranks: every row": (Mesh, "every_row"),
    "ranks: gather": (Mesh, "all_gather"),
    "ranks: exchange": (dsv4.layers.moe, "dispatch"),
}


@dataclass(frozen=True)
class Made:
    """One call of a prompt. shape: of an op with weights. nbytes: what an op moves, see traffic.py."""

    op: str
    shape: str = ""
    nbytes: int = 0
    flop: int = 0


@dataclass(frozen=True)
class Timed:
    """When a call ran, in microseconds since the prompt began on the device; ahead: the host, when it asked for it."""

    start: float
    end: float
    ahead: float


def read(model: Model, cache: KVCache, ids: Tensor, chunk: int) -> None:
    """Append ids [T] i64 to a new sequence, in chunks, and drop it."""
    slot = cache.acquire()
    try:
        for part in ids.split(chunk):
            model.forward([(slot, part)], cache)
    finally:
        cache.release(slot)


def made_by(launch: Launch, cache: KVCache) -> list[Made]:
    """The calls of a prompt, in order. Synchronises at each, keeps none of their tensors."""
    found, held = [], storages(cache)

    def keep(call: Call) -> None:
        if call.op in REGISTRY:
            [work] = work_of([call], held)
            found.append(Made(call.op, work.shape, work.nbytes, flop_of(call) if call.op in GEMMS else 0))
        else:
            found.append(Made(call.op))

    with recording(lambda: True, also=BESIDE, keep=keep):
        launch()
    return found


def time_calls(launch: Launch, timer: Timer) -> tuple[list[Timed], float]:
    """When each call of one more prompt ran, and how long all of it took. The device has nothing else to do."""
    marks: list[tuple[float, Any, Any]] = []

    def begin() -> tuple[float, Any]:
        return time.perf_counter(), timer.mark()

    with recording(lambda: True, also=BESIDE, begin=begin, keep=lambda call: marks.append((*call.begun, timer.mark()))):
        zero, first = begin()
        launch()
        whole = timer.between(first, timer.mark())
    found = []
    for asked, begun, ended in marks:
        start = timer.between(first, begun)
        found.append(Timed(start, timer.between(first, ended), max(start - (asked - zero) * 1e6, 0.0)))
    return found, whole


def bars(made: Sequence[Made], timed: Sequence[Timed]) -> list[Bar]:
    """The calls as launches of a waterfall: what is between two is the gap of the second."""
    before = [0.0, *(one.end for one in timed)][:-1]
    return [
        Bar(call.op, call.shape, call.nbytes, one.start, one.end, end)
        for call, one, end in zip(made, timed, before, strict=True)
    ]


def table(
    made: Sequence[Made], timed: Sequence[Timed], whole: float, layers: int, copy_gb_s: float, dense_tflop_s: float
) -> list[dict[str, Any]]:
    """A row per op and shape in the order of their first calls; then what no call accounts for, then the prompt.

    time_share is of the prompt; ahead_us the host's, at the row's call where it was least ahead: about 0 where the
    device waited for it.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for place, call in enumerate(made):
        groups.setdefault((call.op, call.shape), []).append(place)
    rows, left = [], whole
    for (op, shape), places in groups.items():
        us = sum(timed[i].end - timed[i].start for i in places)
        left -= us
        row = _row(op, shape, len(places), us, whole, layers)
        flop, nbytes = sum(made[i].flop for i in places), sum(made[i].nbytes for i in places)
        if us and flop:
            row |= {"flop": flop, **rate(flop, us, dense_tflop_s)}
        if us and nbytes:
            row |= {"bytes": nbytes, **speed(nbytes, us, copy_gb_s)}
        rows.append(row | {"ahead_us": round(min(timed[i].ahead for i in places), 1)})
    rows.append(_row(REST, "", None, left, whole, layers))
    return [*rows, _row(WHOLE, "", None, whole, whole, layers) | {"calls": len(made)}]


def _row(op: str, shape: str, calls: int | None, us: float, whole: float, layers: int) -> dict[str, Any]:
    return {
        "op": op,
        "shape": shape,
        "calls": calls,
        "us_per_call": round(us / calls, 2) if calls else None,
        "us_per_layer": round(us / layers, 2),
        "us": round(us, 1),
        "time_share": round(us / whole, 4),
        **dict.fromkeys(("flop", "tflop_s", "dense_share", "bytes", "gb_s", "share", "ahead_us")),
    }
