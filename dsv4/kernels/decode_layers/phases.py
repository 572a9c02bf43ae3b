"""The steps of a program as records: which op, on which tensors, into which buffers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dsv4.kernels.grouped_linear.operand import GroupedOperand
from dsv4.kernels.linear.operand import LinearOperand
from dsv4.kernels.moe.operand import ExpertsOperand


@dataclass(frozen=True)
class Product:
    """A call of linear (or, with groups, of grouped_linear): x [T, K] times the operand's projections."""

    x: Tensor
    operand: LinearOperand | GroupedOperand
    out: tuple[Tensor, ...]


@dataclass(frozen=True)
class Linear:
    """Products of one K that do not depend on each other."""

    products: tuple[Product, ...]


@dataclass(frozen=True)
class Call:
    """What an op is given by place and by name, and what it writes."""

    args: tuple[Any, ...]
    named: dict[str, Any]
    out: tuple[Tensor, ...]


class Seam(Call):
    """mhc_seam."""


class Inputs(Call):
    """attn_inputs."""


class Index(Call):
    """index_topk."""


class Attention(Call):
    """sparse_attention."""


@dataclass(frozen=True)
class Experts:
    """ffn_inputs (`args`, `routing` by name), the shared expert's second product, and moe of x [T, D] into out."""

    args: tuple[Any, ...]
    routing: dict[str, Any]
    x: Tensor
    shared_w2: LinearOperand
    experts: ExpertsOperand
    out: Tensor


Phase = Linear | Seam | Inputs | Index | Attention | Experts


def operands(phase: Phase) -> Iterator[LinearOperand | GroupedOperand | ExpertsOperand]:
    """The weights in tiles that a phase reads."""
    if isinstance(phase, Linear):
        yield from (product.operand for product in phase.products)
    elif isinstance(phase, Experts):
        yield from (phase.shared_w2, phase.experts)
