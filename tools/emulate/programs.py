"""Programs of decode_layers as its cases have them, of one rank or of several, and all that they leave."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dsv4.kernels.case import Maker
from dsv4.kernels.check import flat
from dsv4.kernels.decode_layers.cases import Small
from dsv4.kernels.decode_layers.decode_layers import decode_layers
from dsv4.kernels.decode_layers.describe import Room
from dsv4.kernels.decode_layers.phases import Experts, Linear, Phase, Seam
from dsv4.kernels.decode_layers.program import Program, make_tables
from dsv4.kernels.mhc_seam.peers import Peers, inbox_words
from tools.emulate.run import launched_here, weights_as_on_a_gpu

CPU = torch.device("cpu")
SHARED_BYTES = 231424  # of a block, as an H200 has them


def programs(
    rows: int, padding: int, format: str, *, short: bool = False, entries: int = 0, ranks: int = 1
) -> list[Small]:
    """Two layers in the form that kernels read, for each rank; the same arguments give the same numbers. What makes a
    sublayer's output, of which each rank has a part, is each rank's own weights.
    """
    with weights_as_on_a_gpu():
        found = [_small(20, rows, padding, format, short, entries) for _ in range(ranks)]
        others = [_small(20 + rank, rows, padding, format, short, entries) for rank in range(1, ranks)]
    if ranks == 1:
        return found
    inboxes = [torch.zeros(inbox_words(ranks), dtype=torch.int64) for _ in found]
    addresses = [inbox.data_ptr() for inbox in inboxes]
    parts = [torch.zeros(small.y.shape, dtype=torch.float32) for small in found]
    for rank, (small, weights) in enumerate(zip(found, [found[0], *others], strict=True)):
        peers = Peers.of(rank, addresses, CPU, lambda y: torch.stack(parts).sum(0))
        pairs = zip(small.phases, weights.phases, strict=True)
        small.phases = [_of_rank(phase, other, small.y, parts[rank], peers) for phase, other in pairs]
        small.y = parts[rank]
        small.program = Program(small.phases, small.h, small.y)
        small.written.append(inboxes[rank])
    return found


def _small(seed: int, rows: int, padding: int, format: str, short: bool, entries: int) -> Small:
    make = Maker(CPU)
    make.generator.manual_seed(seed)
    return Small(make, rows, padding, format, short=short, entries=entries)


def _of_rank(phase: Phase, other: Phase, whole: Tensor, part: Tensor, peers: Peers) -> Phase:
    """The phase, where it writes or reads a sublayer's output: this rank's part, by the weights of `other`."""
    if isinstance(phase, Seam):
        return Seam((part, *phase.args[1:]), {**phase.named, "peers": peers}, phase.out)
    if isinstance(phase, Experts) and isinstance(other, Experts):
        return replace(phase, experts=other.experts, shared_w2=other.shared_w2, out=part)
    if isinstance(phase, Linear) and isinstance(other, Linear) and phase.products[0].out[0] is whole:
        return Linear((replace(phase.products[0], operand=other.products[0].operand, out=(part,)),))
    return phase


def left_by(ranks: Sequence[Small], grid: int, seed: int) -> dict[str, Tensor]:
    """All that a launch of the programs, each by `grid` blocks, leaves."""
    with launched_here(seed, len(ranks)):
        for small in ranks:
            small.program.tables = make_tables(small.program.phases, small.h, grid, SHARED_BYTES)
        for small in ranks:
            inspect.unwrap(decode_layers)(small.h, small.program)
    found = enumerate({**results(small), **told(small)} for small in ranks)
    return {f"{name}, rank {rank}": x for rank, left in found for name, x in left.items()}


def told(small: Small) -> dict[str, Tensor]:
    """What blocks have told the one that routes, and it them, of the last layer."""
    assert small.program.tables is not None
    room = next(x for x in small.program.tables.held if isinstance(x, Room))
    return {"logits told": room.logits, "plan told": room.plan}


def results(small: Small) -> dict[str, Tensor]:
    """What a program writes, in the order of its phases: by the number of the first that writes it, or is given it to
    update; at last y, which several do.
    """
    names: dict[int, str] = {}
    for role in ("writes", "is given"):
        for place, phase in enumerate(small.phases):
            if isinstance(phase, Linear):
                tensors = [x for p in phase.products for x in (p.out if role == "writes" else (p.x,))]
            else:
                tensors = flat(phase.out if role == "writes" else phase.args)
            for number, x in enumerate(tensors):
                names.setdefault(x.data_ptr(), f"{place:02} {type(phase).__name__} {role} {number}")
    found = {names.get(x.data_ptr(), "inbox"): x for x in small.written}
    return {name: found[name] for name in sorted(found)} | {"y": small.y}
