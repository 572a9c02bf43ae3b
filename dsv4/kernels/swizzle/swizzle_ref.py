"""Twins of swizzle and swizzle_grouped."""

import torch
from torch import Tensor

from dsv4.quant import layouts


def swizzle_ref(scale: Tensor) -> Tensor:
    return layouts.swizzle_32_4_4(scale)


def grouped_tiles(rows: int, groups: int) -> int:
    """Tiles of 128 rows that any split of so many rows into so many groups fits in."""
    return min(rows, rows // 128 + min(groups, rows))


def swizzle_grouped_ref(scale: Tensor, group_rows: Tensor) -> Tensor:
    tiles = grouped_tiles(len(scale), len(group_rows))
    whole = scale.new_zeros(tiles * layouts.swizzled_size(128, scale.shape[1]))
    used = layouts.swizzle_grouped(scale, group_rows.tolist())
    whole.view(torch.uint8)[: len(used)] = used.view(torch.uint8)
    return whole
