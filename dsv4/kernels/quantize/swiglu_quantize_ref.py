"""Twin of swiglu_quantize."""

import torch
from torch import Tensor

from dsv4.kernels.quantize.quantize_act_ref import quantize_act_ref
from dsv4.kernels.swiglu.swiglu_ref import activated_ref
from dsv4.quant.activations import Treatment


def swiglu_quantize_ref(
    gate: Tensor, up: Tensor, weights: Tensor | None, how: Treatment, *, limit: float
) -> tuple[Tensor, Tensor | None]:
    a = activated_ref(gate, up, limit)
    if weights is not None:
        a = a * weights.unsqueeze(-1)
    return quantize_act_ref(a.to(torch.bfloat16), how)
