"""Which ops a step calls, with what: recorded while the step is captured, so that the tensors are the graph's own."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dsv4.kernels.op import REGISTRY


@dataclass(frozen=True)
class Call:
    """One call of an op: `function` is the op itself; `result` what it returned; `begun` what was noted before it."""

    op: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    begun: Any = None

    def again(self) -> Any:
        return self.function(*self.args, **self.kwargs)

    @property
    def shape(self) -> str:
        """`[1, 4096] x 3.54 MB`: of the first arguments, the sizes of tensors and the bytes of operands."""
        words = []
        for value in self.args[:3]:
            if isinstance(value, Tensor):
                words.append(str(list(value.shape)))
            elif is_operand(value):
                words.append(f"{value.nbytes / 1e6:.2f} MB")
        return " x ".join(words)


def is_operand(value: Any) -> bool:
    """Whether this is what an op made of weights."""
    return not isinstance(value, Tensor) and isinstance(getattr(value, "nbytes", None), int)


Given = Callable[..., dict[str, Any]]  # of a call's arguments: what it is given besides, by name


@contextmanager
def recording(
    when: Callable[[], bool],
    ops: Collection[str] | None = None,
    *,
    keep: Callable[[Call], object] | None = None,
    given: Mapping[str, Given] | None = None,
    also: Mapping[str, tuple[Any, str]] | None = None,
    begin: Callable[[], Any] = lambda: None,
) -> Iterator[list[Call]]:
    """Every call that modules outside `dsv4.kernels` make of an op (of those in `ops`) while `when()` holds.

    Inside, names bound to ops are bound to recorders; what is kept keeps its memory. Not for use from several threads.
    keep: gets each call instead of the list. given: by op, what all its calls get besides their arguments. also: what
    is no op, by the name to record it under: the module or class that has it, and its name there. begin: is called
    before each call.
    """
    calls: list[Call] = []
    noted, more = keep or calls.append, given or {}
    names = {id(function): name for name, function in REGISTRY.items() if ops is None or name in ops}
    changed = [(holder, attribute, vars(holder)[attribute]) for holder, attribute in (also or {}).values()]
    for name, (holder, attribute, value) in zip(also or {}, changed, strict=True):
        setattr(holder, attribute, _recorder(name, value, when, noted, None, begin))
    for module_name, module in list(sys.modules.items()):
        if not module_name.startswith("dsv4.") or module_name.startswith(("dsv4.kernels.", "dsv4.bench.")):
            continue
        for attribute, value in list(vars(module).items()):
            if id(value) in names:
                changed.append((module, attribute, value))
                op = names[id(value)]
                setattr(module, attribute, _recorder(op, value, when, noted, more.get(op), begin))
    try:
        yield calls
    finally:
        for module, attribute, value in changed:
            setattr(module, attribute, value)


def _recorder(
    op: str,
    function: Callable[..., Any],
    when: Callable[[], bool],
    keep: Callable[[Call], object],
    given: Given | None,
    begin: Callable[[], Any],
) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        more = given(*args, **kwargs) if given is not None else {}
        begun = begin()
        result = function(*args, **kwargs, **more)
        if when():
            keep(Call(op, function, args, kwargs, result, begun))
        return result

    return call


def distinct_experts(calls: list[Call], layers: int) -> list[float] | None:
    """Experts that the rows of the last step chose, by layer; None unless there is one routing per layer.

    Reads device memory: call it after a replay, and what the replay chose is counted.
    """
    chosen = [_ids(call.result) for call in calls if call.op == "ffn_inputs"][-layers:]
    if len(chosen) < layers:
        return None
    return [float(len(ids[ids >= 0].unique())) for ids in chosen]


def _ids(result: Any) -> Tensor:
    ids = result[0] if isinstance(result, tuple) else result
    assert isinstance(ids, Tensor)
    return ids
