"""The one launch behind the quantising ops: a block per row, which it reads once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.launch import contiguous, dtype_code, result, same_device, same_dtype
from dsv4.kernels.loader import Kernel
from dsv4.quant.activations import Treatment
from dsv4.quant.nvfp4 import GROUP

HOW = {"none": 0, "fp8": 1, "nvfp4": 2}  # How in quantize.cu
MAX_COLUMNS = 512 * 4 * GROUP  #: threads x turns x columns: what a block keeps in registers

_KERNEL = Kernel("quantize", "pppppppqiqiqifii")


def check_columns(name: str, columns: int, how: Treatment) -> None:
    if how not in HOW:
        raise KernelError(f"{name}: how = '{how}'; expected one of {', '.join(HOW)}")
    if how == "nvfp4" and columns % GROUP:
        raise KernelError(f"{name}: rows of {columns} columns; NVFP4 needs a multiple of {GROUP}, pad with zeros")
    if columns > MAX_COLUMNS:
        raise KernelError(f"{name}: rows of {columns} columns; the kernel takes up to {MAX_COLUMNS}")


def strides_of(name: str, arg: str, x: Tensor) -> tuple[int, int]:
    """Elements between rows and between columns of x [..., K]: a slice of a wider tensor, or every n-th column."""
    if x.numel() == 0:
        return x.shape[-1], 1
    try:
        rows = x.view(-1, x.shape[-1])
    except RuntimeError:
        rows = None
    if rows is None or any(size > 1 and stride <= 0 for size, stride in zip(rows.shape, rows.stride(), strict=True)):
        raise KernelError(
            f"{name}: '{arg}' has strides {list(x.stride())} for shape {list(x.shape)}; the kernel needs rows that are "
            "evenly apart and do not lie on one another: pass .contiguous()"
        )
    return rows.stride(0), rows.stride(1) if x.shape[-1] > 1 else 1


def launch_values(
    name: str,
    x: Tensor,
    how: Treatment,
    out: Sequence[Tensor | None] | None,
    up: Tensor | None = None,
    weights: Tensor | None = None,
    limit: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """(values [..., K] bf16, row_scale [...] f32 or None) of x, or of SwiGLU of x and `up`."""
    check_columns(name, x.shape[-1], how)
    values_out, scale_out = (*out, None)[:2] if out is not None else (None, None)
    values = result(name, values_out, tuple(x.shape), torch.bfloat16, x.device)
    row_scale = None
    if how == "nvfp4":
        row_scale = result(name, scale_out, tuple(x.shape[:-1]), torch.float32, x.device)
    _launch(name, x, up, weights, (values, None, None, row_scale), limit, how)
    return values, row_scale


def launch_codes(name: str, x: Tensor, out: Sequence[Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [..., K/2] u8, scales [..., K/16] e4m3, globals [...] f32) of x."""
    lead, columns = tuple(x.shape[:-1]), x.shape[-1]
    check_columns(name, columns, "nvfp4")
    given = tuple(out) if out is not None else (None, None, None)
    codes = result(name, given[0], (*lead, columns // 2), torch.uint8, x.device)
    scales = result(name, given[1], (*lead, columns // GROUP), torch.float8_e4m3fn, x.device)
    globals_ = result(name, given[2], lead, torch.float32, x.device)
    if codes.data_ptr() % 8:
        raise KernelError(f"{name}: codes start at {codes.data_ptr():#x}; the kernel needs a multiple of 8 bytes")
    _launch(name, x, None, None, (None, codes, scales, globals_), 0.0, "nvfp4")
    return codes, scales, globals_


def _launch(
    name: str,
    x: Tensor,
    up: Tensor | None,
    weights: Tensor | None,
    results: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    limit: float,
    how: Treatment,
) -> None:
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    same_device(name, x.device, up=up, weights=weights)
    contiguous(name, weights=weights)
    if up is not None:
        same_dtype(name, "gate", x, "up", up)
    if weights is not None and (weights.dtype != torch.float32 or weights.numel() != rows):
        raise KernelError(f"{name}: 'weights' is {list(weights.shape)} {weights.dtype}; expected [{rows}] float32")
    strides = *strides_of(name, "x", x), *(strides_of(name, "up", up) if up is not None else (0, 0))
    code = dtype_code(name, "x", x)
    _KERNEL(x.device, x, up, weights, *results, rows, x.shape[-1], *strides, limit, HOW[how], code)
