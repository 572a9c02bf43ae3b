"""Every kernel against its twin on the GPU at hand: poisoned outputs between guard bytes, then error and time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.cases import IN_PLACE, OPS, Case, cases

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
    unknown = sorted(set(ops) - OPS.keys())
    if unknown:
        raise KernelError(f"no kernel to check: {', '.join(unknown)}; ops with kernels: {', '.join(OPS)}")
    device = torch.device("cuda", torch.cuda.current_device())
    for case in cases(device, quick=quick):
        if not ops or case.op in ops:
            yield check_case(case, timed=timed and not quick)


def check_case(case: Case, *, timed: bool) -> Row:
    op, twin = OPS[case.op]
    in_place = case.op in IN_PLACE
    args = _copied(case.args)
    expected = _tensors(twin(*_copied(case.args), **case.kwargs))
    tolerances = case.tolerance(case.args, expected)
    targets = [Guarded(case.args[0], copy=True)] if in_place else [Guarded(y) for y in expected]
    outputs = tuple(target.tensor for target in targets)
    launch = _launcher(op, args, case.kwargs, outputs, in_place)
    launch()
    if outputs[0].is_cuda:
        torch.cuda.synchronize()
    findings = [f"output {i} was written past its end" for i, target in enumerate(targets) if not target.intact()]
    if any(not torch.equal(a, b) for a, b in zip(_flat(args), _flat(case.args), strict=True)):
        findings.append("an input was changed")
    error, bound, share, equal = _compare(outputs, expected, tolerances)
    if share > 1:
        findings.append(f"error {error:.3g} exceeds the bound {bound:.3g}")
    us = _microseconds(launch) if timed and outputs[0].numel() else None
    moved = sum(x.numel() * x.element_size() for x in _moved(case, outputs))
    gb_s = None if us is None else moved / us * 1e-3
    return Row(case.op, case.name, case.dtype, error, bound, share, equal, us, gb_s, "; ".join(findings) or None)


def _launcher(
    op: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], outputs: tuple[Tensor, ...], in_place: bool
) -> Callable[[], Any]:
    if in_place:
        return lambda: op(outputs[0], *args[1:], **kwargs)
    return lambda: op(*args, **kwargs, out=outputs if len(outputs) > 1 else outputs[0])


def _compare(
    found: Sequence[Tensor], expected: Sequence[Tensor], tolerances: Sequence[Tensor | None]
) -> tuple[float, float, float, float]:
    """Largest error, bound there, error as a share of the bound there, share of equal values; NaN is infinitely far."""
    worst, same, count = (0.0, 0.0, 0.0), 0, 0
    for a, b, tolerance in zip(found, expected, tolerances, strict=True):
        if a.numel() == 0:
            continue
        same, count = same + int((a == b).sum()), count + a.numel()
        error = (a.double() - b.double()).abs().nan_to_num(nan=float("inf"))
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


def _moved(case: Case, outputs: Sequence[Tensor]) -> list[Tensor]:
    """What a launch reads and writes: rope the channels that turn, a hash layer one row of its table per token."""
    if case.op == "rope":
        x, cis = case.args
        tail = x[..., -2 * cis.shape[1] :]
        return [tail, tail, cis]
    tables = [case.args[2]] if case.op == "router" else []
    return [x for x in _flat(case.args) if not any(x is table for table in tables)] + list(outputs)


def _tensors(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def _flat(args: tuple[Any, ...]) -> list[Tensor]:
    return [arg for arg in args if isinstance(arg, Tensor)]


def _copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Fresh tensors with the same strides."""
    return tuple(_twin_of(arg) if isinstance(arg, Tensor) else arg for arg in args)


def _twin_of(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
