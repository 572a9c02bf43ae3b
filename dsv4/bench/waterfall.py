"""Where a decode step goes: what each launch adds to it, and each phase of a launch of all layers, by op and by layer.

Kernels start before the one in front has ended (programmatic dependent launch), so their own durations hold waiting and
add up to more than the step. What a launch adds is `visible`: its end minus the latest end before it. That includes its
`gap`, the time in which nothing ran, and adds up to the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from dsv4.bench.owners import own_name, owner_of
from dsv4.bench.report import speed
from dsv4.bench.timing import Kernel
from dsv4.bench.traffic import Work

_RUN_BY = {"grouped_linear": "linear"}  # ops without a kernel of their own -> whose they launch
_SPEED = ("bytes", "gb_s", "share")
PHASE, SEAM, EXPERTS = "phase: ", "seam", "experts"  # in front of a phase's name; the names between which layers lie


@dataclass(frozen=True)
class Bar:
    """One launch in a step, or one phase of it (phases.py). before: the latest end of those in front. shape: of the
    call that made it, where told. nbytes: what the call moves, at its first launch. block: of a phase, the median
    block's own time.
    """

    op: str
    shape: str
    nbytes: int
    start: float
    end: float
    before: float
    block: float | None = None

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape}".rstrip()

    @property
    def visible(self) -> float:
        return max(self.end - self.before, 0.0)

    @property
    def gap(self) -> float:
        return max(self.start - self.before, 0.0)

    @property
    def own(self) -> float:
        return self.end - self.start


def bars(kernels: Sequence[Kernel], work: Sequence[Work]) -> list[Bar]:
    """The launches of one step, each with the op and bytes of its call. `work`: all calls of ops in it, in order."""
    found, latest = [], kernels[0].start if kernels else 0.0
    for kernel, (op, shape, nbytes) in zip(kernels, _calls([kernel.name for kernel in kernels], work), strict=True):
        found.append(Bar(op, shape, nbytes, kernel.start, kernel.end, latest))
        latest = max(latest, kernel.end)
    return found


def _calls(names: Sequence[str], work: Sequence[Work]) -> list[tuple[str, str, int]]:
    """(op, shape, bytes) of each kernel.

    A kernel that follows one of another op begins a call, and so does every other of its name; an op's other kernels
    belong to the call in front. Where this gives as many calls as were made they are these, in order. Elsewhere an op's
    launches share its bytes evenly and its shapes are not told.
    """
    owners = [owner_of(name) for name in names]
    functions = list(map(own_name, names))
    found = [(owner, "", 0) for owner in owners]
    for owner in dict.fromkeys(owners):
        places = [place for place, other in enumerate(owners) if other == owner]
        heads = {functions[place] for place in places if place == 0 or owners[place - 1] != owner}
        made = [call for call in work if _RUN_BY.get(call.op, call.op) == owner]
        begins = [functions[place] in heads for place in places]
        if sum(begins) == len(made):
            for place, begun, first in zip(places, accumulate(map(int, begins)), begins, strict=True):
                call = made[begun - 1]
                found[place] = (call.op, call.shape, call.nbytes if first else 0)
        else:
            total = sum(call.nbytes for call in made)
            for turn, place in enumerate(places):
                share = total * (turn + 1) // len(places) - total * turn // len(places)
                found[place] = (owner, "", share)
    return found


def layers_of(step: Sequence[Bar]) -> list[list[Bar]]:
    """The launches (or phases) of each layer: from the mHC launch that leads into its attention to the last before the
    next one's (of the last layer: before the one that leaves it). Empty where the step does not look like that.
    """
    starts, left = [], True
    for place, bar in enumerate(step):
        op = bar.op.removeprefix(PHASE)
        if left and op.startswith(("mhc_", SEAM)):
            starts.append(place)
            left = False
        left = left or op in ("moe", EXPERTS)
    return [list(step[a:b]) for a, b in pairwise(starts)]


def table(step: Sequence[Bar], layers: int, copy_gb_s: float) -> list[dict[str, Any]]:
    """A row per op and shape in the order of their first launches, then `step`, their sum. Microseconds: visible;
    gap_us of them with nothing running, for a phase: blocks meeting; block_us, of phases: the median block's, a phase.
    """
    groups: dict[tuple[str, str], list[Bar]] = {}
    for bar in step:
        groups.setdefault((bar.op, bar.shape), []).append(bar)
    rows = [_row(op, shape, group, layers, copy_gb_s) for (op, shape), group in groups.items()]
    return [*rows, _row("step", "", step, layers, copy_gb_s)]


def _row(op: str, shape: str, group: Sequence[Bar], layers: int, copy_gb_s: float) -> dict[str, Any]:
    us, nbytes = sum(bar.visible for bar in group), sum(bar.nbytes for bar in group)
    blocks = [bar.block for bar in group if bar.block is not None]
    known = {"bytes": nbytes, **speed(nbytes, us, copy_gb_s)} if nbytes and us else dict.fromkeys(_SPEED)
    return {
        "op": op,
        "shape": shape,
        "launches": len(group),
        "us_per_launch": round(us / len(group), 3),
        "us_per_layer": round(us / layers, 3),
        "us": round(us, 2),
        "gap_us": round(sum(bar.gap for bar in group), 2),
        **known,
        "own_us": round(sum(bar.own for bar in group), 2),
        "block_us": round(sum(blocks) / len(blocks), 3) if len(blocks) == len(group) else None,
    }
