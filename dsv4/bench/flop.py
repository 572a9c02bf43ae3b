"""Multiplications and additions of the ops that multiply with weights: two per weight and row that use it."""

from __future__ import annotations

from math import prod

from torch import Tensor

from dsv4.bench.record import Call
from dsv4.bench.traffic import chosen_of
from dsv4.kernels.grouped_linear.operand import GroupedOperand
from dsv4.kernels.linear.operand import LinearOperand
from dsv4.kernels.moe.operand import ExpertsOperand
from dsv4.kernels.moe.tiled import TiledExperts

GEMMS = frozenset({"linear", "grouped_linear", "moe"})


def flop_of(call: Call) -> int:
    """Of one call of an op in GEMMS. Attention, mHC and all else is not counted. Synchronises: of experts those count
    that the rows chose, and this rank holds.
    """
    operand = call.args[1]
    if isinstance(operand, ExpertsOperand):
        down = operand.down
        inner = down.columns if isinstance(down, TiledExperts) else down.values.shape[-1]
        return 2 * chosen_of(operand, call.args[2]).numel() * 3 * int(call.args[0].shape[-1]) * inner
    if isinstance(operand, GroupedOperand):
        weights = sum(prod(part.shape) for part in operand.tiled) or operand.groups.values.numel()
    else:
        assert isinstance(operand, LinearOperand)
        weights = sum(prod(projection.weight.shape[-2:]) for projection in operand.projections)
    return 2 * rows_of(call) * weights


def rows_of(call: Call) -> int:
    """Rows that the call is given."""
    x = call.args[0]
    assert isinstance(x, Tensor)
    return x.numel() // x.shape[-1]
