"""The weights of projections that share one input, joined by how that input is treated before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.linear.launch import Launcher
from dsv4.kernels.linear.tiled import Tiled, TiledRows, tiled
from dsv4.quant import nvfp4
from dsv4.quant.activations import Act, Treatment, treatment
from dsv4.quant.half import HalfMatrix, pack, pays
from dsv4.quant.weights import NVFP4Weight, Weight


@dataclass(frozen=True)
class Dense:
    """A matrix as the CPU multiplies with it.

    values [..., N, K]: BF16 where that is exact, as E2M1 * E4M3 and E4M3 * 2^n are, else float32. A decode step on a
    CPU is bound by reading these bytes: half of them, widened on the way, take half the time.
    alpha [..., N] float32, or None for one: the factor of the float32 accumulator (NVFP4's global).
    """

    values: Tensor
    alpha: Tensor | None
    _halves: dict[int | None, HalfMatrix | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def matmul(self, x: Tensor, expert: int | None = None, *, half: bool = False) -> Tensor:
        """x [..., K] float32 -> [..., N] float32; with leading experts, by one of them.

        half: the order of summation is free, so a product in FP16 without rounding may do (dsv4/quant/half.py). Float32
        models, which have the bits of DeepSeek's script, leave it to PyTorch.
        """
        found = self._half(expert) if half and pays(x.numel() * self.values.shape[-2]) else None
        if found is None:
            y = torch.nn.functional.linear(x, (self.values if expert is None else self.values[expert]).float())
        else:
            y = found.matmul(x)
        if self.alpha is not None:
            y.mul_(self.alpha if expert is None else self.alpha[expert])
        return y

    def _half(self, expert: int | None) -> HalfMatrix | None:
        """The values, of one expert if there are several, in FP16; made at its first use."""
        if expert not in self._halves:
            self._halves[expert] = pack(self.values if expert is None else self.values[expert])
        return self._halves[expert]


def dense(*weights: Weight) -> Dense:
    """Join weights [..., N_i, K] row-wise."""
    parts, alphas = zip(*map(_exact, weights), strict=True)
    narrow = all(p.dtype == torch.bfloat16 for p in parts)
    values = torch.cat([p if narrow else p.float() for p in parts], dim=-2)
    if all(a is None for a in alphas):
        return Dense(values, None)
    ones = (torch.ones(p.shape[:-1], device=p.device) for p in parts)
    rows = [one if a is None else one * a.unsqueeze(-1) for one, a in zip(ones, alphas, strict=True)]
    return Dense(values, torch.cat(rows, dim=-1))


def _exact(weight: Weight) -> tuple[Tensor, Tensor | None]:
    """(values, factor): BF16 if it holds them, factoring NVFP4's global out where that helps."""
    values = weight.dequantize(torch.float32)
    if torch.equal(values.bfloat16().float(), values):
        return values.bfloat16(), None
    if isinstance(weight, NVFP4Weight):
        one = torch.ones_like(weight.global_scale)
        return nvfp4.dequantize(weight.codes, weight.scale, one, torch.bfloat16), weight.global_scale
    return values, None


@dataclass(frozen=True)
class Projection:
    """One weight [N, K] of a linear op. plain: its input is never quantised. f32: its output stays float32."""

    weight: Weight | Tiled
    plain: bool = False
    f32: bool = False


@dataclass(frozen=True)
class Joined:
    """Projections whose input is treated alike, as one matrix: `rows` of it each, `places` in the op's result."""

    treatment: Treatment
    matrix: Dense | TiledRows
    rows: list[int]
    places: list[int]


@dataclass(frozen=True)
class LinearOperand:
    """Projections of one input; what they share is computed once. On a GPU their weights are Tiled."""

    projections: tuple[Projection, ...]
    joined: tuple[Joined, ...]
    launcher: Launcher | None = field(default=None, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as stored: what a decode step must read."""
        return sum(p.weight.nbytes for p in self.projections)


def linear_operand(*projections: Projection | Weight, act: Act) -> LinearOperand:
    """Join projections of one input; a bare Weight takes the defaults of Projection.

    Weights on a GPU are repacked, and the operand keeps nothing of the form they came in; what is packed already, by
    another operand, is shared.
    """
    every = tuple(p if isinstance(p, Projection) else Projection(p) for p in projections)
    widths = {p.weight.shape[-1] for p in every}
    if len(widths) != 1:
        raise KernelError(f"linear: projections that share an input must have one K, got {sorted(widths)}")
    kinds: dict[Treatment, list[int]] = {}
    for place, p in enumerate(every):
        kinds.setdefault("none" if p.plain else treatment(p.weight.format, act), []).append(place)
    weights = [p.weight for p in every]
    launcher = None
    if any((w.device if isinstance(w, Weight) else w.tiles.device).type == "cuda" for w in weights):
        weights = [tiled(w) if isinstance(w, Weight) else w for w in weights]
        every = tuple(replace(p, weight=w) for p, w in zip(every, weights, strict=True))
        launcher = Launcher([w for w in weights if isinstance(w, Tiled)])
    joined = tuple(
        Joined(how, _matrix([weights[i] for i in places]), [weights[i].shape[-2] for i in places], places)
        for how, places in kinds.items()
    )
    return LinearOperand(every, joined, launcher)


def _matrix(weights: Sequence[Weight | Tiled]) -> Dense | TiledRows:
    packed = tuple(w for w in weights if isinstance(w, Tiled))
    return TiledRows(packed) if packed else dense(*(w for w in weights if isinstance(w, Weight)))
