"""Bytes that one recorded call of an op must move: its tensors, of an operand what its rows use, of the cache what its
rows name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dsv4.bench.record import Call, is_operand
from dsv4.kernels.moe.operand import ExpertsOperand
from dsv4.kvcache import KVCache

_TABLES = {"tid2eid", "embed", "table", "weight_rows"}  # of which a row per token is read
_ROWS_OF = {"local": "local_rows", "pool": "pool_rows"}  # cache argument -> the row numbers that read it


@dataclass(frozen=True)
class Work:
    """One call of an op. shape: of its input and weights, empty for an op without weights."""

    op: str
    shape: str
    nbytes: int


def storages(cache: KVCache) -> set[int]:
    """Addresses of the cache's buffers: no op reads them as a whole."""
    return {buffer.untyped_storage().data_ptr() for layer in cache.layers for buffer in vars(layer).values()}


def moved_bytes(call: Call, cache: set[int]) -> int:
    """Reads and writes of one call. Synchronises: row numbers are counted as they are now."""
    named = _named(call)
    total = sum(_size(tensor) for tensor in _tensors(call.result) if not _held(tensor, cache))
    for name, value in named.items():
        if isinstance(value, Tensor):
            total += _argument(name, value, named, cache)
        elif is_operand(value):
            total += round(value.nbytes * _used(named, value))
        elif name != "out":
            total += sum(_size(tensor) for tensor in _tensors(value) if not _held(tensor, cache))
    return total


def weight_bytes(call: Call) -> int:
    """Of what `moved_bytes` counts, the operands'."""
    named = _named(call)
    return sum(round(value.nbytes * _used(named, value)) for value in named.values() if is_operand(value))


def work_of(calls: Sequence[Call], cache: set[int]) -> list[Work]:
    """Each call in words and bytes. Synchronises, as `moved_bytes`."""
    return [
        Work(call.op, call.shape if any(map(is_operand, call.args)) else "", moved_bytes(call, cache)) for call in calls
    ]


def _named(call: Call) -> dict[str, Any]:
    try:
        return dict(inspect.signature(call.function).bind(*call.args, **call.kwargs).arguments)
    except (TypeError, ValueError):  # an op that hides its parameters: positions will do
        return {str(i): value for i, value in enumerate(call.args)} | call.kwargs


def _argument(name: str, tensor: Tensor, named: dict[str, Any], cache: set[int]) -> int:
    if name in _TABLES:
        rows = next((named[key] for key in ("tokens", "ids") if isinstance(named.get(key), Tensor)), None)
        return _size(tensor) if rows is None else rows.numel() * _row(tensor)
    if not _held(tensor, cache):
        return _size(tensor)
    rows = named.get(_ROWS_OF.get(name, ""))
    if isinstance(rows, Tensor):
        return int((rows >= 0).sum()) * _row(tensor)
    visible = named.get("visible")
    if name == "keys" and isinstance(visible, Tensor):
        return int(visible.sum()) * _row(tensor)
    return 0  # what appends to the cache moves little beside its arguments


def _used(named: dict[str, Any], operand: Any) -> float:
    """Share of an operand that is read: of the experts that it holds those chosen, else all."""
    ids = named.get("ids")
    if not isinstance(ids, Tensor) or not isinstance(operand, ExpertsOperand):
        return 1.0
    return len(chosen_of(operand, ids).unique()) / len(operand.held)


def chosen_of(operand: ExpertsOperand, ids: Tensor) -> Tensor:
    """Those of ids [...] i64 whose expert the operand holds, one by one."""
    return ids[(ids >= operand.held.start) & (ids < operand.held.stop)]


def _held(tensor: Tensor, cache: set[int]) -> bool:
    return tensor.untyped_storage().data_ptr() in cache


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _row(tensor: Tensor) -> int:
    return tensor.shape[-1] * tensor.element_size()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors in a (nested) result, sequence, mapping or record."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors([getattr(value, field.name) for field in dataclasses.fields(value)])
