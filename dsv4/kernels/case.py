"""One call of an op on which its kernel and its twin must agree, the seeded tensors it is made of, and how far apart
results may be. Each op's cases lie in its folder (`cases.py`): shapes of V4, ragged and empty ones.

A tolerance is a tensor per output; none means that bits are the contract.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Tolerances = list[Tensor | None]
F32_ULP = 2.0**-23
BF16_ULP = 2.0**-7  # of the smallest mantissa: both sides round once, so values that differ a little differ by one
EPS = 1e-6
FLASH, PRO = 4096, 7168  # hidden_size
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


@dataclass(frozen=True)
class Case:
    """Arguments of one call, on the GPU, and how far the kernel `run` may be from its `twin`.

    Compared are the results the op returns (if `returns`), then the arguments at `in_place`, which the op updates;
    `view` turns both lists into what the tolerance speaks of (packed bytes into values, say). Arguments may be records
    and sequences of tensors. `moved`: bytes that a launch must read and write, where that is not all of the above.
    """

    op: str
    name: str
    dtype: str
    run: Callable[..., Any]
    twin: Callable[..., Any]
    args: tuple[Any, ...]
    tolerance: Callable[[tuple[Any, ...], list[Tensor]], Tolerances]
    kwargs: dict[str, Any] = field(default_factory=dict)
    in_place: tuple[int, ...] = ()
    returns: bool = True
    view: Callable[[list[Tensor]], list[Tensor]] | None = None
    moved: int | None = None


class Maker:
    """Seeded tensors on one device."""

    def __init__(self, device: torch.device):
        self.device, self.generator = device, torch.Generator(device).manual_seed(20)

    def normal(self, *shape: int, dtype: str = "f32", scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator, device=self.device) * scale).to(DTYPES[dtype])

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def cis(self, rows: int, dims: int) -> Tensor:
        angles = torch.outer(
            self.integers(0, 1 << 17, rows).float(), 1e4 ** (-torch.arange(dims // 2) / 32).to(self.device)
        )
        return torch.polar(torch.ones_like(angles), angles)


def nbytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def rounding(expected: Tensor) -> Tensor:
    """One unit in the last place of a BF16 result; nothing for float32."""
    wide = expected.double().abs()
    return wide * BF16_ULP if expected.dtype == torch.bfloat16 else wide * 0


def pairs(x: Tensor) -> Tensor:
    """The length of every channel's pair: what a rotation keeps, and what its rounding is relative to."""
    return x.double().unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(*x.shape[:-1], -1, 2).flatten(-2)


def relative(factor: float) -> Callable[[tuple[Any, ...], list[Tensor]], Tolerances]:
    return lambda args, expected: [rounding(y) + y.double().abs() * factor + 1e-30 for y in expected]


def bits(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    return [None for _ in expected]
