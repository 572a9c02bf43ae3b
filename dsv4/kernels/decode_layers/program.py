"""A program: the phases of a decode step, and on a GPU what its blocks read of them (include/dsv4/persistent)."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.decode_layers import describe
from dsv4.kernels.decode_layers.beside import overlapped
from dsv4.kernels.decode_layers.describe import Room, joined
from dsv4.kernels.decode_layers.phases import Experts, Index, Linear, Phase, Seam, operands
from dsv4.kernels.decode_layers.spread import WARPS, segments_on
from dsv4.kernels.launch import device_sizes
from dsv4.kernels.moe.operand import ExpertsOperand

ROWS, MAX_BLOCKS, MAX_STAGES, CHUNK = 8, 160, 8, 2304  # constants of program.cuh
_STATIC_BYTES = 256  # of it, which the kernel declares itself
_ALIGNED = 128  # bytes: the work area's end


class Unfit(KernelError):
    """The kernel does not take such a program; the ops by themselves may."""


@dataclass(frozen=True)
class Tables:
    """On the GPU: phases [count * PHASE_BYTES] u8, what warps read, where blocks meet, and the words with which
    they add up in seams. `held`: what phases point to.
    """

    phases: Tensor
    segments: Tensor
    starts: Tensor
    state: Tensor
    words: Tensor
    count: int
    needs: int  # of a kernel: what the smallest do not have, by bits
    grid: int
    stages: int  # of a warp's ring
    work_bytes: int
    held: tuple[object, ...]


class Program:
    """h [T, M, D]: the streams that the first phases read; y [T, D]: what the last one writes. Both are buffers of
    `phases`, and T is at most ROWS.

    On a GPU the tables are made here, once. Unfit for what the kernel does not take.
    """

    def __init__(self, phases: Sequence[Phase], h: Tensor, y: Tensor):
        if not 1 <= len(h) <= ROWS:
            raise Unfit(f"decode_layers: {len(h)} rows; a program takes 1 to {ROWS}")
        self.phases, self.h, self.y = tuple(phases), h, y
        self.tables = _tables(self.phases, h) if h.is_cuda else None

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that a step reads: of routed experts as many as its rows may choose."""
        total = 0
        for phase in self.phases:
            for operand in operands(phase):
                if isinstance(operand, ExpertsOperand) and isinstance(phase, Experts):
                    chosen = len(phase.x) * phase.routing["topk"] / phase.args[0].shape[1]
                    total += round(operand.nbytes * min(1.0, chosen))
                else:
                    total += operand.nbytes
        return total


def _tables(phases: tuple[Phase, ...], h: Tensor) -> Tables:
    device = h.device
    processors, shared = device_sizes(device)
    describe.ready(device)
    try:
        return make_tables(phases, h, min(processors, MAX_BLOCKS), shared - _STATIC_BYTES)
    except KernelError as refused:
        raise Unfit(str(refused)) from refused


def make_tables(phases: tuple[Phase, ...], h: Tensor, grid: int, shared: int) -> Tables:
    """grid: blocks, one per processor; shared: bytes that a block may ask for. Rings are as deep as they can be; what
    they leave goes to the work area, where experts then stage more at a time.
    """
    rows, device = len(h), h.device
    room = Room.on(device, grid, rows, h.shape[2], next(phase for phase in phases if isinstance(phase, Experts)))
    shared -= room.fixed_bytes
    phases, beside = overlapped(phases, grid)
    told = [describe.whom(phase, then) for phase, then in zip_longest(phases, phases[1:])]
    words = {phase.args[0].data_ptr(): room.logits for phase in phases if isinstance(phase, Experts)}
    products = {
        i: joined(phase, grid, beside.get(i), told[i], words)
        for i, phase in enumerate(phases)
        if isinstance(phase, Linear)
    }
    least = max([room.work_bytes, *(phase.work_bytes(rows) for phase in products.values())])
    stages = min(MAX_STAGES, (shared - least) // (WARPS * CHUNK))
    if stages < 2:
        raise Unfit(
            f"decode_layers: phases of {rows} rows work in {least} bytes of shared memory, which leaves no two stages "
            f"of {WARPS * CHUNK} bytes of the {shared} there are"
        )
    work = (shared - stages * WARPS * CHUNK) // _ALIGNED * _ALIGNED
    made, runs = [], []
    for place, phase in enumerate(phases):
        match phase:
            case Linear():
                made.append(products[place].phase(device, rows))
                runs.append(products[place].run)
            case Experts():
                made += [describe.route(phase, room, work), describe.experts(phase, room, work, told[place])]
                runs.append(describe.shared_run(phase, grid))
            case Index():
                made.append(describe.index(phase, room, beside.get(place + 1) is phase))
            case Seam():
                made.append(describe.seam(phase, room, told[place - 1] if place else None))
            case _:
                made.append(describe.FILL[type(phase)](phase, room))
    segments, starts = segments_on(device, tuple(runs))
    table = torch.frombuffer(bytearray(b"".join(describe.in_order(made))), dtype=torch.uint8).to(device)
    state = torch.zeros(room.state_bytes, dtype=torch.uint8, device=device)
    needs = functools.reduce(operator.or_, map(describe.needs, made))
    return Tables(table, segments, starts, state, room.words, len(made), needs, grid, stages, work, (room, phases))
