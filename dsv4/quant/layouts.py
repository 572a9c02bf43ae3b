"""Scale-factor layout of the FP4 tensor cores: 128x4 tiles, each 32x4x4 ("SWIZZLE_32_4_4", NVFP4 facts 2.1).

Scale (i, j) of a [R, C] scale matrix (C = K/16) goes to byte
    ((i // 128) * ceil(C/4) + j // 4) * 512 + (i % 32) * 16 + ((i % 128) // 32) * 4 + j % 4
Rows are padded to 128 and columns to 4 with zero bytes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4.errors import KernelError


def _padded(rows: int, columns: int) -> tuple[int, int]:
    return -(-rows // 128) * 128, -(-columns // 4) * 4


def swizzled_size(rows: int, columns: int) -> int:
    """Bytes of a swizzled [rows, columns] scale matrix, padding included."""
    padded_rows, padded_columns = _padded(rows, columns)
    return padded_rows * padded_columns


def swizzle_32_4_4(scale: Tensor) -> Tensor:
    """Swizzle scale [..., R, C] (one-byte dtype: e4m3, e8m0, uint8) to [..., swizzled_size(R, C)] of the same dtype.

    Leading dimensions (experts) are swizzled one by one. Padding bytes are zero; R = 0 gives no bytes.
    """
    rows, columns = scale.shape[-2:]
    padded_rows, padded_columns = _padded(rows, columns)
    raw = F.pad(_raw(scale), (0, padded_columns - columns, 0, padded_rows - rows))
    tiles = raw.view(*scale.shape[:-2], padded_rows // 128, 4, 32, padded_columns // 4, 4)
    lead = range(tiles.ndim - 5)
    order = (*lead, *(len(lead) + d for d in (0, 3, 2, 1, 4)))
    return tiles.permute(order).reshape(*scale.shape[:-2], padded_rows * padded_columns).view(scale.dtype)


def unswizzle_32_4_4(flat: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of swizzle_32_4_4: flat [..., swizzled_size(rows, columns)] to [..., rows, columns], padding dropped."""
    padded_rows, padded_columns = _padded(rows, columns)
    if flat.shape[-1] != padded_rows * padded_columns:
        raise KernelError(
            f"swizzled scales hold {flat.shape[-1]} bytes; "
            f"expected {padded_rows * padded_columns} for {rows} x {columns} scales"
        )
    tiles = _raw(flat).view(*flat.shape[:-1], padded_rows // 128, padded_columns // 4, 32, 4, 4)
    lead = range(tiles.ndim - 5)
    order = (*lead, *(len(lead) + d for d in (0, 3, 2, 1, 4)))
    raw = tiles.permute(order).reshape(*flat.shape[:-1], padded_rows, padded_columns)
    return raw[..., :rows, :columns].contiguous().view(flat.dtype)


def swizzle_grouped(scale: Tensor, group_rows: Sequence[int]) -> Tensor:
    """Swizzle the row groups of scale [T, C] one after another, each padded to 128 rows by itself, into a flat tensor.

    group_rows  rows of each group in order (experts' token counts), summing to T; a group of 0 rows takes no bytes.
    """
    _check_groups(scale.shape[0], group_rows)
    return torch.cat([swizzle_32_4_4(part) for part in _raw(scale).split(list(group_rows))]).view(scale.dtype)


def unswizzle_grouped(flat: Tensor, group_rows: Sequence[int], columns: int) -> Tensor:
    """Inverse of swizzle_grouped: flat bytes back to [sum(group_rows), columns]."""
    sizes = [swizzled_size(rows, columns) for rows in group_rows]
    _check_groups(flat.shape[0], sizes)
    parts = zip(_raw(flat).split(sizes), group_rows, strict=True)
    return torch.cat([unswizzle_32_4_4(part, rows, columns) for part, rows in parts]).view(flat.dtype)


def _check_groups(total: int, sizes: Sequence[int]) -> None:
    if not sizes or sum(sizes) != total:
        raise KernelError(f"groups of {list(sizes)} entries add up to {sum(sizes)}; expected {total}")


def _raw(tensor: Tensor) -> Tensor:
    if tensor.element_size() != 1:
        raise KernelError(f"scales are {tensor.dtype}; expected a one-byte format")
    return tensor.view(torch.uint8)
