"""What launchers ask of their tensors: a dtype code, rows of equal stride, a result to write into."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.errors import KernelError

_CODES = {torch.bfloat16: 0, torch.float32: 1}  # Dtype in include/dsv4/launch.cuh


def dtype_code(name: str, arg: str, x: Tensor) -> int:
    code = _CODES.get(x.dtype)
    if code is None:
        raise KernelError(f"{name}: '{arg}' has dtype {x.dtype}; the kernel takes torch.bfloat16 or torch.float32")
    return code


def bf16_only(name: str, arg: str, x: Tensor) -> None:
    """For ops whose kernel is written for BF16 alone."""
    if x.dtype != torch.bfloat16:
        raise KernelError(
            f"{name}: '{arg}' is {x.dtype}; the kernel takes torch.bfloat16, and float32 on a GPU runs through the "
            f"twin: set DSV4_REF={name}, or DSV4_REF=all"
        )


def same_dtype(name: str, arg: str, x: Tensor, other: str, y: Tensor) -> None:
    if x.dtype != y.dtype:
        raise KernelError(
            f"{name}: '{arg}' is {x.dtype} and '{other}' is {y.dtype}; the kernel takes one dtype for both"
        )


def contiguous(name: str, **tensors: Tensor | None) -> None:
    for arg, x in tensors.items():
        if x is not None and not x.is_contiguous():
            raise KernelError(
                f"{name}: '{arg}' has strides {list(x.stride())} for shape {list(x.shape)}; the kernel needs it "
                "contiguous: pass .contiguous()"
            )


def same_device(name: str, device: torch.device, **tensors: Tensor | None) -> None:
    for arg, x in tensors.items():
        if x is not None and x.device != device:
            raise KernelError(f"{name}: '{arg}' is on {x.device}, the first argument on {device}; move it there")


def row_stride(name: str, arg: str, x: Tensor) -> int:
    """Elements between rows of x [..., N]: rows may lie apart, as in a slice of a wider tensor, but evenly."""
    if x.numel() == 0:
        return x.shape[-1]
    try:
        rows = x.view(-1, x.shape[-1])
    except RuntimeError:
        rows = None
    if rows is None or (rows.stride(1) != 1 and x.shape[-1] > 1) or (rows.stride(0) == 0 and len(rows) > 1):
        raise KernelError(
            f"{name}: '{arg}' has strides {list(x.stride())} for shape {list(x.shape)}; the kernel needs rows that are "
            "contiguous and evenly apart: pass .contiguous()"
        )
    return rows.stride(0)


def heads_of(name: str, arg: str, x: Tensor) -> Tensor:
    """x [T, N] or [T, H, N] as [T, H, N] with contiguous channels; rows and heads may lie apart, not on one another."""
    x = x.unsqueeze(1) if x.dim() == 2 else x
    stacked = any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True))
    if x.dim() != 3 or (x.shape[-1] > 1 and x.stride(-1) != 1) or stacked:
        raise KernelError(
            f"{name}: '{arg}' has shape {list(x.shape)}, strides {list(x.stride())}; the kernel takes [T, N] or "
            "[T, H, N] with contiguous channels"
        )
    return x


def rotations(name: str, cis: Tensor, rows: int, channels: int) -> int:
    """The row stride of cis [T, R/2] complex64, checked against the T rows and N channels it turns."""
    if cis.dtype != torch.complex64 or cis.dim() != 2 or cis.is_conj():
        raise KernelError(
            f"{name}: 'cis' must be [T, R/2] complex64, conjugates resolved; got {list(cis.shape)} {cis.dtype}"
        )
    if cis.shape[0] != rows or 2 * cis.shape[1] > channels or channels % 2:
        raise KernelError(
            f"{name}: 'cis' is {list(cis.shape)} for {rows} rows of {channels} channels; expected [{rows}, R/2] with R "
            "at most the channels, an even number"
        )
    if cis.shape[1] > 1 and cis.stride(1) != 1:
        raise KernelError(f"{name}: 'cis' has strides {list(cis.stride())}; the kernel needs contiguous rows")
    return cis.stride(0)


def four_streams(name: str, h: Tensor, fn: Tensor | None = None, rows: int = 0) -> tuple[int, int, int]:
    """T, M, D of h [T, M, D]; the kernels are written for M = 4 and for fn [rows, M*D]."""
    tokens, streams, width = h.shape
    if streams != 4:
        raise KernelError(f"{name}: 'h' has M = {streams} streams; the kernel is written for M = 4 (hc_mult of V4)")
    if fn is not None and fn.shape != (rows, streams * width):
        raise KernelError(f"{name}: 'fn' is {list(fn.shape)}; expected [{rows}, {streams * width}]")
    return tokens, streams, width


def device_sizes(device: torch.device) -> tuple[int, int]:
    """Processors of a GPU, and bytes of shared memory that one block may ask for."""
    properties = torch.cuda.get_device_properties(device)
    shared = int(getattr(properties, "shared_memory_per_block_optin"))  # noqa: B009 (torch's stub does not know it)
    return properties.multi_processor_count, shared


def result(name: str, out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`out` if it was given and fits, else a new tensor."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if out.shape != shape or out.dtype != dtype or out.device != device or not out.is_contiguous():
        raise KernelError(
            f"{name}: 'out' is {list(out.shape)} {out.dtype} on {out.device}, strides {list(out.stride())}; expected a "
            f"contiguous {list(shape)} {dtype} on {device}"
        )
    return out
