"""Projections of one input: NVFP4, MXFP4, FP8 128x128 or plain weights, W4A16 or quantised activations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.launch import bf16_only, result, row_stride, same_device
from dsv4.kernels.linear.linear_ref import linear_ref
from dsv4.kernels.linear.operand import LinearOperand
from dsv4.kernels.op import op
from dsv4.kernels.quantize.quantize_act import quantize_act


@op("linear", ref=linear_ref, shapes={"x": "* K : bf16 f32"})
def linear(x: Tensor, operand: LinearOperand, *, out: Tensor | Sequence[Tensor] | None = None) -> list[Tensor]:
    """x @ W_i^T for every projection of the operand.

    x [..., K] bf16|f32 -> [[..., N_i]] in x's dtype, or float32 where the projection says so. The input is quantised
    once per treatment (dsv4/quant/activations.py); accumulation is float32, NVFP4's global scale applies there, and
    each output is rounded once.

    On a GPU x is BF16. After the launches that quantise, one launch makes all outputs of up to 8 rows, two those of
    up to 64; more rows take several. Up to 192 rows, a row has the same bits whatever rows are beside it and
    however many; beyond, weights are unpacked for cuBLAS, which adds up in an order of its own.
    """
    if operand.launcher is None:
        raise KernelError("linear: x is on a GPU and the operand's weights are not; make it of weights on that GPU")
    columns = operand.launcher.columns
    bf16_only("linear", "x", x)
    if x.shape[-1] != columns:
        raise KernelError(f"linear: x has {x.shape[-1]} columns, the operand's weights {columns}")
    same_device("linear", operand.launcher.device, x=x)
    row_stride("linear", "x", x)
    rows = x.reshape(x.numel() // columns, columns)
    given = [None] * len(operand.projections) if out is None else [out] if isinstance(out, Tensor) else list(out)
    outputs = [
        result("linear", to, (*x.shape[:-1], p.weight.shape[-2]), torch.float32 if p.f32 else x.dtype, x.device)
        for p, to in zip(operand.projections, given, strict=True)
    ]
    inputs: list[Tensor] = [rows] * len(outputs)
    row_scales: list[Tensor | None] = [None] * len(outputs)
    for part in operand.joined:
        if part.treatment != "none":
            values, row_scale = quantize_act(rows, part.treatment)
            for place in part.places:
                inputs[place], row_scales[place] = values, row_scale
    operand.launcher(inputs, row_scales, [y.view(len(rows), y.shape[-1]) for y in outputs])
    return outputs
