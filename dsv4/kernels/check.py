"""Every kernel against its twin on the GPU at hand: poisoned outputs between guard bytes, then error and time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.case import Case, nbytes
from dsv4.kernels.cases import cases, ops_with_cases

GUARD_BYTES = 256
_GUARD, _POISON = 0xA5, 0xFF  # 0xFF everywhere is NaN in BF16 and float32 and -1 in int64
_LAUNCHES = 20  # per graph


@dataclass(frozen=True)
class Row:
    """What one case gave. `share`: the largest share that an error has of its bound; `equal`: of equal values."""

    op: str
    case: str
    dtype: str
    max_error: float  # this and the bound: at the element of the largest share
    bound: float
    share: float
    equal: float
    us: float | None
    gb_s: float | None
    finding: str | None

    @property
    def ok(self) -> bool:
        return self.finding is None


class Guarded:
    """A poisoned tensor with guard bytes on both sides."""

    def __init__(self, like: Tensor, *, copy: bool = False):
        size = like.numel() * like.element_size()
        self.bytes = torch.full((GUARD_BYTES + size + GUARD_BYTES,), _GUARD, dtype=torch.uint8, device=like.device)
        payload = self.bytes[GUARD_BYTES : GUARD_BYTES + size]
        payload.fill_(_POISON)
        self.tensor = payload.view(like.dtype).view(like.shape)
        if copy:
            self.tensor.copy_(like)

    def intact(self) -> bool:
        sides = self.bytes[:GUARD_BYTES], self.bytes[-GUARD_BYTES:]
        return all(bool((side == _GUARD).all()) for side in sides)


def check_kernels(ops: Sequence[str] = (), *, quick: bool = False, timed: bool = True) -> Iterator[Row]:
    """Run the cases of `ops` (all when empty) on the current GPU."""
    if not torch.cuda.is_available():
        raise KernelError("checking kernels needs a CUDA GPU, and torch sees none; on a CPU every op is its twin")
    known = ops_with_cases()
    unknown = sorted(set(ops) - set(known))
    if unknown:
        raise KernelError(f"no kernel to check: {', '.join(unknown)}; ops with kernels: {', '.join(known)}")
    device = torch.device("cuda", torch.cuda.current_device())
    for case in cases(device, ops, quick=quick):
        yield check_case(case, timed=timed and not quick)


def check_case(case: Case, *, timed: bool) -> Row:
    """Run one case; an op that raises is a finding like any other."""
    args, expected, one = _twin(case)
    tolerances = case.tolerance(case.args, expected if case.view is None else case.view(expected))
    updated = [Guarded(args[place], copy=True) for place in case.in_place]
    for place, target in zip(case.in_place, updated, strict=True):
        args[place] = target.tensor
    returned = [Guarded(y) for y in expected[: len(expected) - len(updated)]]
    found = [target.tensor for target in (*returned, *updated)]
    out: dict[str, Any] = {}
    if case.returns:
        out["out"] = found[0] if one else tuple(target.tensor for target in returned)
    inputs = [x for place, arg in enumerate(args) if place not in case.in_place for x in flat(arg)]
    before = [x.clone() for x in inputs]

    def launch() -> None:
        case.run(*args, **case.kwargs, **out)

    try:
        launch()
        if any(x.is_cuda for x in found):
            torch.cuda.synchronize()
    except KernelError as failure:
        return Row(case.op, case.name, case.dtype, 0.0, 0.0, 0.0, 0.0, None, None, str(failure))
    written = [target.intact() for target in (*returned, *updated)]
    findings = [f"output {i} was written past its end" for i, intact in enumerate(written) if not intact]
    if any(not _same(a, b) for a, b in zip(before, inputs, strict=True)):
        findings.append("an input was changed")
    values, truth = (found, expected) if case.view is None else (case.view(found), case.view(expected))
    error, bound, share, equal = _compare(values, truth, tolerances)
    if share > 1:
        findings.append(f"error {error:.3g} exceeds the bound {bound:.3g}")
    us = _microseconds(launch) if timed and found[0].numel() else None
    moved = nbytes(*inputs, *found) if case.moved is None else case.moved
    gb_s = None if us is None else moved / us * 1e-3
    return Row(case.op, case.name, case.dtype, error, bound, share, equal, us, gb_s, "; ".join(findings) or None)


def _twin(case: Case) -> tuple[list[Any], list[Tensor], bool]:
    """The arguments; the twin's results and the arguments it updated; whether its result is a single tensor."""
    args = list(case.args)
    for place in case.in_place:
        args[place] = args[place].clone()
    result = case.twin(*args, **case.kwargs)
    expected = flat(result) if case.returns else []
    return list(case.args), expected + [args[place] for place in case.in_place], isinstance(result, Tensor)


def _compare(
    found: Sequence[Tensor], expected: Sequence[Tensor], tolerances: Sequence[Tensor | None]
) -> tuple[float, float, float, float]:
    """Largest error, bound there, error as a share of the bound there, share of equal values; NaN is infinitely far."""
    worst, same, count = (0.0, 0.0, 0.0), 0, 0
    for a, b, tolerance in zip(found, expected, tolerances, strict=True):
        if a.numel() == 0:
            continue
        x, y = _numbers(a), _numbers(b)
        alike = (x == y) | (x.isnan() & y.isnan())
        same, count = same + int(alike.sum()), count + x.numel()
        error = torch.where(alike, 0.0, (x - y).abs().nan_to_num(nan=float("inf"), posinf=float("inf")))
        limit = torch.zeros_like(error) if tolerance is None else tolerance.double()
        shares = torch.where(error == 0, 0.0, error / limit).flatten()  # an error where none is allowed: infinite
        at = int(shares.argmax())
        worst = max(worst, (float(shares[at]), float(error.flatten()[at]), float(limit.flatten()[at])))
    return worst[1], worst[2], worst[0], same / count if count else 1.0


def _microseconds(launch: Callable[[], Any]) -> float:
    """Median of 5 replays of a CUDA graph of launches that follow one another: operands that fit are in L2."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(_LAUNCHES):
            launch()
    graph.replay()
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / _LAUNCHES)
    return sorted(times)[2]


def _numbers(x: Tensor) -> Tensor:
    """Float64 [...], a last dimension of two for complex numbers."""
    return (torch.view_as_real(x) if x.is_complex() else x).double()


def flat(value: Any) -> list[Tensor]:
    """The tensors in nested sequences, mappings and records, in order."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value) and not isinstance(value, type):
        return [x for f in fields(value) for x in flat(getattr(value, f.name))]
    if isinstance(value, Mapping):
        return [x for item in value.values() for x in flat(item)]
    return [x for item in value for x in flat(item)] if isinstance(value, list | tuple) else []


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, so that NaN equals itself."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) if a.numel() else True
