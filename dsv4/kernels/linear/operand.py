"""The weights of projections that share one input, and how that input is treated before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.quant import fp8, nvfp4
from dsv4.quant.weights import Weight

Act = Literal["bf16", "fp8", "nvfp4"]
Treatment = Literal["none", "fp8", "nvfp4"]
ACTS: tuple[Act, ...] = ("bf16", "fp8", "nvfp4")


def treatment(format: str, act: Act) -> Treatment:
    """How the input of a weight stored as `format` is quantised under activation mode `act`.

    FP8 weights meet FP8 inputs (1x128) in both quantised modes, as the checkpoint's own recipe says; 4-bit weights
    meet FP8 inputs under `fp8` (DeepSeek's script) and NVFP4 inputs under `nvfp4` (W4A4). Plain weights never quantise
    their input.
    """
    if act == "bf16" or format in ("bf16", "f32"):
        return "none"
    return "fp8" if act == "fp8" or format == "fp8" else "nvfp4"


def treat(x: Tensor, how: Treatment) -> Tensor:
    """The values the multiplication sees: x [..., K] bf16|f32 -> [..., K] float32.

    `fp8`: E4M3 in groups of 128 with power-of-two scales. `nvfp4`: E2M1 in blocks of 16 with E4M3 scales and one
    float32 global per row, so that a row's result never depends on the rows beside it.
    """
    if how == "fp8":
        return fp8.act_fake_quant(x, 128).float()
    if how == "nvfp4":
        return nvfp4.dequantize(*nvfp4.quantize(x, per_row=True), dtype=torch.float32)
    return x.float()


def dense(*weights: Weight) -> Tensor:
    """[..., sum N_i, K] float32, joined row-wise: what the CPU multiplies with.

    Products of E2M1, E4M3 and E8M0 are exact in float32; only NVFP4's float32 global rounds (2^-24) by being folded
    in. BF16 would halve the bytes where it is exact, but is slower on a CPU: converting costs more than it saves.
    """
    return torch.cat([w.dequantize(torch.float32) for w in weights], dim=-2)


@dataclass(frozen=True)
class LinearOperand:
    """Weights [N_i, K] that share their input; per treatment of that input, one joined matrix."""

    weights: tuple[Weight, ...]
    treatments: tuple[Treatment, ...]
    joined: dict[Treatment, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as stored: what a decode step must read."""
        return sum(w.nbytes for w in self.weights)


def linear_operand(*weights: Weight, act: Act, weight_only: bool = False) -> LinearOperand:
    """Join projections of one input. `weight_only` keeps the input unquantised whatever `act` says."""
    widths = {w.shape[-1] for w in weights}
    if len(widths) != 1:
        raise KernelError(f"linear: projections that share an input must have one K, got {sorted(widths)}")
    treatments = tuple("none" if weight_only else treatment(w.format, act) for w in weights)
    joined = {
        how: dense(*(w for w, t in zip(weights, treatments, strict=True) if t == how))
        for how in dict.fromkeys(treatments)
    }
    return LinearOperand(weights, treatments, joined)
