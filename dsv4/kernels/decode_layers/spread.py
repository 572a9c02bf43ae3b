"""How the products of a program are spread over blocks and warps, and the list of weights that each warp reads."""

from __future__ import annotations

import functools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.tiles import BF16_BYTES, FP8_BYTES, NVFP4_BYTES

WARPS, SLICE_BLOCKS = 16, 8  # constants of include/dsv4/persistent/program.cuh and linear.cuh
# Bytes of a block -> of the pieces in which a warp reads them.
_CHUNKS = {NVFP4_BYTES: 4 * NVFP4_BYTES, FP8_BYTES: 2 * FP8_BYTES, BF16_BYTES: BF16_BYTES}
HALF = 8  # segments that a warp loads at a time (memory.cuh): lists begin at multiples of it, and it loads two ahead
_SEGMENT = np.dtype([("from", "<u8"), ("bytes", "<i4"), ("chunk", "<i4")])  # Segment in program.cuh


@dataclass(frozen=True)
class Spread:
    """order: the parts as their tiles are numbered. Block b has the tiles cuts[b] .. cuts[b + 1], at most `most`."""

    order: tuple[int, ...]
    cuts: tuple[int, ...]
    most: int


@functools.cache
def spread(parts: tuple[tuple[int, int, int], ...], grid: int) -> Spread:
    """parts: (tiles, bytes of a block, number of the input) of each; all have the same K.

    A block's tiles have one input, staged in one way: as it is for BF16, scaled for narrower formats. The busiest block
    gets as few bytes as that allows, and then the busiest of each input.
    """

    def kind(place: int) -> tuple[int, bool]:
        return parts[place][2], parts[place][1] == BF16_BYTES

    order = sorted(range(len(parts)), key=kind)
    groups: dict[tuple[int, bool], list[int]] = {}  # bytes of every tile
    for place in order:
        groups.setdefault(kind(place), []).extend([parts[place][1]] * parts[place][0])
    if len(groups) > grid:
        raise KernelError(f"decode_layers: {len(groups)} inputs of one phase for {grid} blocks")
    before = [[0, *accumulate(tiles)] for tiles in groups.values()]
    most = bisect_left(range(max(sums[-1] for sums in before) + 1), True, key=functools.partial(_fits, before, grid))
    spare = grid - _blocks(before, most)
    found, first = [0], 0
    for sums in before:
        room = _blocks([sums], most) + spare
        own = bisect_left(range(most + 1), True, key=functools.partial(_fits, [sums], room))
        cuts = _cut(sums, own)
        found += [first + cut for cut in cuts]
        first, spare = first + len(sums) - 1, room - len(cuts)
    found += found[-1:] * (grid + 1 - len(found))
    return Spread(tuple(order), tuple(found), max(b - a for a, b in pairwise(found)))


def _fits(groups: Sequence[Sequence[int]], blocks: float, most: int) -> bool:
    return _blocks(groups, most) <= blocks


def _cut(sums: Sequence[int], most: int) -> list[int]:
    """Tiles whose bytes add up to `sums`, cut into blocks of at most `most` bytes: their ends; empty if none fits."""
    found: list[int] = []
    while (at := found[-1] if found else 0) < len(sums) - 1:
        end = bisect_right(sums, sums[at] + most) - 1
        if end == at:
            return []
        found.append(end)
    return found


def _blocks(groups: Sequence[Sequence[int]], most: int) -> float:
    """How many blocks groups of tiles take, of at most so many bytes each."""
    return sum(len(_cut(sums, most)) or inf for sums in groups)


def even_cuts(tiles: int, grid: int) -> tuple[int, ...]:
    """As many tiles for every block, the first ones taking what is left over."""
    each, more = divmod(tiles, grid)
    return tuple(b * each + min(b, more) for b in range(grid + 1))


class Run(NamedTuple):
    """The weights of one phase. parts: (address, tiles, bytes of a block) of each, in the order of their tiles."""

    parts: tuple[tuple[int, int, int], ...]
    blocks: int  # of a tile
    cuts: tuple[int, ...]
    opens: bool  # behind them come weights that only the step knows


@functools.lru_cache(maxsize=8)
def segments_on(device: torch.device, runs: tuple[Run, ...]) -> tuple[Tensor, Tensor]:
    """Segment lists of all warps [n * 16] u8, and where each begins [grid * WARPS] i32. Programs of the same weights
    share them, whatever their rows.
    """
    segments, starts = segments_of(runs)
    return (
        torch.from_numpy(segments.view(np.uint8)).to(device),
        torch.from_numpy(starts.astype(np.uint32).view(np.int32)).to(device),
    )


def segments_of(runs: Sequence[Run]) -> tuple[NDArray[np.void], NDArray[np.int64]]:
    warps = (len(runs[0].cuts) - 1) * WARPS
    every, marker = np.arange(warps), np.zeros(warps, _SEGMENT)
    owners, lists = [], []
    for run in runs:
        owner, units = _units(run)
        owners.append(owner)
        lists.append(units)
        if run.opens:
            owners.append(every)
            lists.append(marker)
    owners.append(every)
    lists.append(marker)
    owner = np.concatenate(owners)
    counts = np.bincount(owner, minlength=warps)
    room = -(-counts // HALF) * HALF
    starts, every_unit = np.cumsum(room) - room, np.argsort(owner, kind="stable")
    segments = np.zeros(room.sum() + 2 * HALF, _SEGMENT)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    segments[np.repeat(starts, counts) + within] = np.concatenate(lists)[every_unit]
    return segments, starts


def _units(run: Run) -> tuple[NDArray[np.int64], NDArray[np.void]]:
    """The warp of every (tile, slice), tile by tile, and where its weights lie."""
    address, tiles, block = (np.array(column, dtype=np.int64) for column in zip(*run.parts, strict=True))
    cuts = np.array(run.cuts, dtype=np.int64)
    part = np.repeat(np.arange(len(tiles)), tiles)
    tile = np.arange(len(part))
    place = np.searchsorted(cuts, tile, side="right") - 1
    slice_ = np.arange(-(-run.blocks // SLICE_BLOCKS))
    within = (tile - cuts[place])[:, None] * len(slice_) + slice_
    found = np.empty(within.shape, _SEGMENT)
    here = (tile - (np.cumsum(tiles) - tiles)[part]) * run.blocks
    found["from"] = address[part][:, None] + (here[:, None] + slice_ * SLICE_BLOCKS) * block[part][:, None]
    found["bytes"] = np.minimum(run.blocks - slice_ * SLICE_BLOCKS, SLICE_BLOCKS) * block[part][:, None]
    found["chunk"] = np.array([_CHUNKS[size] for size in block.tolist()])[part][:, None]
    return (place[:, None] * WARPS + within % WARPS).ravel(), found.ravel()
