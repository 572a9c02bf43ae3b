"""Multiplications and additions of the ops that multiply with weights: two per weight and row that use it."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor

from dsv4.bench.record import Call
from dsv4.kernels.grouped_linear.operand import GroupedOperand
from dsv4.kernels.linear.operand import LinearOperand
from dsv4.kernels.moe.operand import ExpertsOperand
from dsv4.kernels.moe.tiled import TiledExperts

GEMMS = frozenset({"linear", "grouped_linear", "moe"})


def flop_of(call: Call) -> int:
    """Of one call of an op in GEMMS. Attention, mHC and all else is not counted."""
    return 2 * rows_of(call) * _weights(call.args[1], call.args)


def rows_of(call: Call) -> int:
    """Rows that the call multiplies."""
    x = call.args[0]
    assert isinstance(x, Tensor)
    return x.numel() // x.shape[-1]


def _weights(operand: Any, args: tuple[Any, ...]) -> int:
    """Weights that one row meets."""
    if isinstance(operand, LinearOperand):
        return sum(prod(projection.weight.shape[-2:]) for projection in operand.projections)
    if isinstance(operand, GroupedOperand):
        return sum(prod(part.shape) for part in operand.tiled) or operand.groups.values.numel()
    assert isinstance(operand, ExpertsOperand)
    down, (width, chosen) = operand.down, (args[0].shape[-1], args[2].shape[-1])
    inner = down.columns if isinstance(down, TiledExperts) else down.values.shape[-1]
    return 3 * width * inner * chosen
