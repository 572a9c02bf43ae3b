"""Projections of one input: NVFP4, MXFP4, FP8 128x128 or plain weights, W4A16 or quantised activations."""

import torch
from torch import Tensor

from dsv4.kernels.linear.linear_ref import linear_ref
from dsv4.kernels.linear.operand import LinearOperand
from dsv4.kernels.op import no_kernel, op


@op("linear", ref=linear_ref, shapes={"x": "* K : bf16 f32"})
def linear(x: Tensor, operand: LinearOperand, dtype: torch.dtype | None = None) -> list[Tensor]:
    """x @ W_i^T for every weight of the operand.

    x [..., K] bf16|f32 -> [[..., N_i]] in `dtype` (default: x's). The input is quantised once per treatment
    (operand.treat); accumulation is float32, NVFP4's global scale applies there, and each output is rounded once.
    """
    raise no_kernel("linear")
