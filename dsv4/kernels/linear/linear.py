"""Projections of one input: NVFP4, MXFP4, FP8 128x128 or plain weights, W4A16 or quantised activations."""

from torch import Tensor

from dsv4.kernels.linear.linear_ref import linear_ref
from dsv4.kernels.linear.operand import LinearOperand
from dsv4.kernels.op import no_kernel, op


@op("linear", ref=linear_ref, shapes={"x": "* K : bf16 f32"})
def linear(x: Tensor, operand: LinearOperand) -> list[Tensor]:
    """x @ W_i^T for every projection of the operand.

    x [..., K] bf16|f32 -> [[..., N_i]] in x's dtype, or float32 where the projection says so. The input is quantised
    once per treatment (dsv4/quant/activations.py); accumulation is float32, NVFP4's global scale applies there, and
    each output is rounded once.
    """
    raise no_kernel("linear")
