"""Phases of decode_layers as bars of a waterfall: when they ran by the kernel's own clock, and the bytes of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsv4.bench.record import Call
from dsv4.bench.roofline import expected_distinct
from dsv4.bench.traffic import Work, moved_bytes
from dsv4.bench.waterfall import EXPERTS, PHASE, SEAM, Bar
from dsv4.config import ModelConfig
from dsv4.errors import KernelError
from dsv4.kernels.attn_inputs.attn_inputs import attn_inputs
from dsv4.kernels.decode_layers import phases as kinds
from dsv4.kernels.decode_layers.beside import overlapped
from dsv4.kernels.decode_layers.program import Program
from dsv4.kernels.grouped_linear.grouped_linear import grouped_linear
from dsv4.kernels.grouped_linear.operand import GroupedOperand
from dsv4.kernels.index_topk.index_topk import index_topk
from dsv4.kernels.linear.linear import linear
from dsv4.kernels.mhc_seam.mhc_seam import mhc_seam
from dsv4.kernels.sparse_attention.sparse_attention import sparse_attention

OP = "decode_layers"
_NAMES: dict[type, str] = {kinds.Seam: SEAM, kinds.Experts: EXPERTS}  # others: as their types
_OPS: dict[type, Callable[..., Any]] = {
    kinds.Seam: mhc_seam,
    kinds.Inputs: attn_inputs,
    kinds.Index: index_topk,
    kinds.Attention: sparse_attention,
}


@dataclass(frozen=True)
class Span:
    """A phase in microseconds: from the first block's begin to the last one's end; the median block's own time."""

    start: float
    end: float
    block: float


class Clock:
    """What `recording` gives to calls of decode_layers: `times`, which every replay of a graph captured so fills."""

    def __init__(self) -> None:
        self.noted: list[tuple[Program, Tensor]] = []  # by launch of a step; made when it is first called

    def __call__(self, h: Tensor, program: Program) -> dict[str, Any]:
        if program.tables is None:
            return {}
        found = next((times for other, times in self.noted if other is program), None)
        if found is None:
            shape = program.tables.count, program.tables.grid, 2
            found = torch.zeros(shape, dtype=torch.int64, device=h.device)
            self.noted.append((program, found))
        return {"times": found}

    def split(self, step: Sequence[Bar], held: set[int], config: ModelConfig) -> list[Bar]:
        """The bars of a step, of the last replay, with each launch of decode_layers as its phases. held: `storages`."""
        found = list(step)
        places = [place for place, bar in enumerate(step) if bar.op == OP]
        if len(places) == len(self.noted):
            for place, (program, times) in reversed([*zip(places, self.noted, strict=True)]):
                work = phase_work(program.phases, held, config, times.shape[1])
                found[place : place + 1] = phase_bars(step[place], work, spans(times))
        elif self.noted:
            raise KernelError(f"a step of {len(places)} launches of {OP}, of which {len(self.noted)} were timed")
        return found


def spans(times: Tensor) -> list[Span]:
    """times [phases, blocks, 2] i64, ns: when each block began and ended each phase; 0 where it took no part."""
    times = times.cpu()
    if not bool((times > 0).all(2).any(1).all()):
        raise KernelError(f"{OP} noted no time in some of its {len(times)} phases")
    zero, found = times[times > 0].min(), []
    for phase in times:
        took = (phase[(phase > 0).all(1)] - zero).double() / 1000  # nanoseconds since 1970 are too many for a double
        begin, end = took.unbind(1)
        found.append(Span(float(begin.min()), float(end.max()), float((end - begin).median())))
    return found


def phase_bars(launch: Bar, work: Sequence[Work], spans: Sequence[Span]) -> list[Bar]:
    """A launch as its phases, of which the last one ends with it. What is before the first one begins is its gap."""
    if len(work) != len(spans):
        raise KernelError(f"{OP} noted {len(spans)} phases where its program has {len(work)}")
    zero, latest, found = launch.end - max(span.end for span in spans), launch.before, []
    for one, span in zip(work, spans, strict=True):
        start, end = zero + span.start, zero + span.end
        found.append(Bar(PHASE + one.op, one.shape, one.nbytes, start, end, latest, span.block))
        latest = max(latest, end)
    return found


def phase_work(phases: Sequence[kinds.Phase], held: set[int], config: ModelConfig, grid: int) -> list[Work]:
    """Name, sizes and bytes of each phase, in the order of a kernel of `grid` blocks: what the op of the same work
    moves, and of the routed experts as many as so many rows are expected to choose. An Experts record is two phases.
    """
    order, beside = overlapped(phases, grid)
    return [
        replace(work, op=work.op or name)
        for phase, name in zip(order, _names(order, beside), strict=True)
        for work in _work(phase, held, config)
    ]


def _names(phases: Sequence[kinds.Phase], beside: Mapping[int, kinds.Phase]) -> Iterator[str]:
    """By place in the kernel's order; products by what is around them. beside: of `overlapped`."""
    for place, phase in enumerate(phases):
        before, then = phases[place - 1] if place else None, phases[place + 1] if place + 1 < len(phases) else None
        if not isinstance(phase, kinds.Linear):
            yield _NAMES.get(type(phase), type(phase).__name__.lower())
        elif isinstance(then, kinds.Experts):
            yield "router, w1, w3"
        elif before is None or isinstance(before, kinds.Seam):
            yield "in_proj"
        elif isinstance(beside.get(place), kinds.Index):
            yield "queries beside index"
        elif isinstance(before, kinds.Inputs) or place in beside:
            index = place + 1 + (place in beside)
            yield "index queries" if isinstance(beside.get(index + 1), kinds.Index) else "queries"
        else:
            yield "wo_a" if isinstance(before, kinds.Attention) else "wo_b"


def _work(phase: kinds.Phase, held: set[int], config: ModelConfig) -> Iterator[Work]:
    def moved(function: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any], out: Any) -> int:
        return moved_bytes(Call("", function, args, named, out), held)

    if isinstance(phase, kinds.Linear):
        nbytes = 0
        for product in phase.products:
            op: Callable[..., Any] = grouped_linear if isinstance(product.operand, GroupedOperand) else linear
            nbytes += moved(op, (product.x, product.operand), {}, product.out)
        weights = sum(product.operand.nbytes for product in phase.products)
        yield Work("", _sizes(phase.products[0].x, weights), nbytes)
    elif isinstance(phase, kinds.Experts):
        given = sum(x.nbytes for x in phase.args if isinstance(x, Tensor) and x is not phase.args[4])  # tid2eid: a row
        yield Work("route", _sizes(phase.args[1], phase.shared_w2.nbytes), given + phase.shared_w2.nbytes)
        share = expected_distinct(config, len(phase.x)) / config.n_routed_experts
        chosen = round(phase.experts.nbytes * share)
        yield Work("", _sizes(phase.x, phase.experts.nbytes), chosen + phase.x.nbytes + phase.out.nbytes)
    else:
        yield Work("", "", moved(_OPS[type(phase)], phase.args, phase.named, phase.out))


def _sizes(x: Tensor, weights: int) -> str:
    """As Call.shape."""
    return f"{list(x.shape)} x {weights / 1e6:.2f} MB"
