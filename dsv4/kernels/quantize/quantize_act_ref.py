"""Twin of quantize_act."""

import torch
from torch import Tensor

from dsv4.quant import fp8, nvfp4
from dsv4.quant.activations import Treatment


def quantize_act_ref(x: Tensor, how: Treatment) -> tuple[Tensor, Tensor | None]:
    if how == "nvfp4":
        codes, scale, row_scale = nvfp4.quantize(x, per_row=True)
        return nvfp4.dequantize(codes, scale, torch.ones_like(row_scale), torch.bfloat16), row_scale
    return (fp8.act_fake_quant(x, 128) if how == "fp8" else x).to(torch.bfloat16), None
