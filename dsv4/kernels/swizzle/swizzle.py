"""Scale factors in the layout of the FP4 tensor cores (SWIZZLE_32_4_4), into a buffer that is there already."""

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.launch import contiguous, result, same_device
from dsv4.kernels.loader import Kernel
from dsv4.kernels.op import op
from dsv4.kernels.swizzle.swizzle_ref import grouped_tiles, swizzle_grouped_ref, swizzle_ref
from dsv4.quant.layouts import swizzled_size

_KERNEL = Kernel("swizzle", "pqqiqqpipq")
_ROWS = 128  # of a tile
_ONE_BYTE = (torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu)


@op("swizzle", ref=swizzle_ref, shapes={"scale": "* R C :"})
def swizzle(scale: Tensor, *, out: Tensor | None = None) -> Tensor:
    """scale [..., R, C] of a one-byte dtype -> [..., swizzled_size(R, C)] of the same.

    Each matrix by itself, rows padded to 128 and columns to 4 with zero bytes (quant/layouts.py says where a byte
    goes). `scale` may be a sized view of a larger buffer: rows and matrices lie apart, the bytes of a row do not.
    """
    rows, columns = scale.shape[-2:]
    matrices = scale.numel() // (rows * columns) if scale.numel() else 0
    out = _result(scale, out, (*scale.shape[:-2], swizzled_size(rows, columns)))
    row_stride, matrix_stride = _strides(scale)
    _KERNEL(scale.device, scale, matrices, rows, columns, row_stride, matrix_stride, None, 0, out, -(-rows // _ROWS))
    return out


@op("swizzle_grouped", ref=swizzle_grouped_ref, shapes={"scale": "T C :", "group_rows": "E : i64"})
def swizzle_grouped(scale: Tensor, group_rows: Tensor, *, out: Tensor | None = None) -> Tensor:
    """scale [T, C], group_rows [E] i64 (rows of each group, on the device, T in all) -> flat bytes.

    The groups follow one another, each padded to 128 rows by itself; the result has the size that any split of T rows
    into E groups may need, zeros after the last. Nothing of it depends on the counts but its bytes.
    """
    (rows, columns), groups = scale.shape, len(group_rows)
    tiles = grouped_tiles(rows, groups)
    out = _result(scale, out, (tiles * swizzled_size(_ROWS, columns),))
    contiguous("swizzle_grouped", group_rows=group_rows)
    same_device("swizzle_grouped", scale.device, group_rows=group_rows)
    row_stride, _ = _strides(scale)
    _KERNEL(scale.device, scale, 1, rows, columns, row_stride, 0, group_rows, groups, out, tiles)
    return out


def _result(scale: Tensor, out: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if scale.dtype not in _ONE_BYTE:
        raise KernelError(f"swizzle: scales are {scale.dtype}; expected a one-byte format")
    found = result("swizzle", out, shape, scale.dtype, scale.device)
    if found.data_ptr() % 16:
        raise KernelError(f"swizzle: 'out' starts at {found.data_ptr():#x}; expected a multiple of 16 bytes")
    return found


def _strides(scale: Tensor) -> tuple[int, int]:
    """Bytes between rows and between matrices."""
    try:
        flat = scale.view(-1, *scale.shape[-2:]) if scale.numel() else scale.new_empty(1, *scale.shape[-2:])
    except RuntimeError:
        flat = None
    stacked = flat is not None and any(
        size > 1 and stride == 0 for size, stride in zip(flat.shape, flat.stride(), strict=True)
    )
    if flat is None or stacked or (flat.shape[-1] > 1 and flat.stride(-1) != 1):
        raise KernelError(
            f"swizzle: 'scale' has strides {list(scale.stride())} for shape {list(scale.shape)}; the kernel needs rows "
            "of contiguous bytes that do not lie on one another"
        )
    return flat.stride(1), flat.stride(0)
