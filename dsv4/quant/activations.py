"""How the input of a linear is quantised, by activation mode and by the format of the weight it meets."""

from typing import Literal

import torch
from torch import Tensor

from dsv4.quant import fp8, nvfp4

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
