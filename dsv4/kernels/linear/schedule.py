"""How a launch of more than eight tokens spreads its tiles over the blocks of a GPU (modes OWN and SPLIT of linear.cu).

Every block streams weights at the same rate, so each gets the same bytes. Splitting a tile between blocks costs a trip
through memory and a second kernel: where there are tiles enough, whole ones are given out.
"""

from __future__ import annotations

import functools
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import accumulate, pairwise

from dsv4.errors import KernelError

OWN, MEET, SPLIT, DENSE, ROUND = 0, 1, 2, 3, 4  # Mode in linear.cu
WARPS, CHUNK, SLICE_BLOCKS, SLICE_BYTES = 16, 2304, 8, 1024  # constants of include/dsv4/linear.cuh; a slice of a token
#: Where more than 32 tokens are multiplied, 8 warps take two tiles at a time each (Form in linear.cuh).
_PAIRS_FROM = 33
TOKENS = 64  #: at most, in one launch
MAX_STAGES = 4  #: of the rings of 16 warps; fewer rings may have more stages
_FEW_RINGS_STAGES = 8
_WINDOW = 4  #: slices that SPLIT stages together, where they fit
_ROUND, _ROUND_TOKEN = 16 << 10, 1 << 10  #: bytes that a block reads while a warp multiplies another item
_WHOLE = 1 << 30


@dataclass(frozen=True)
class Plan:
    """cuts: block b takes the units cuts[b] .. cuts[b + 1]; tiles, or with SPLIT slice * tiles + tile."""

    mode: int
    cuts: tuple[int, ...]
    window: int
    batch: int
    streams: int
    stages: int
    shared_bytes: int
    ranks: int = 1  # blocks of a cluster, of which cuts are
    height: int = 1  # tiles that a warp multiplies at a time; more than eight tokens decide it themselves

    @property
    def grid(self) -> int:
        return (len(self.cuts) - 1) * self.ranks


@functools.cache
def plan(parts: tuple[tuple[int, int], ...], blocks: int, tokens: int, processors: int, shared_limit: int) -> Plan:
    """parts: (tiles, bytes of a block) of each; blocks: 64 column blocks of a tile; tokens: 9 to 64 (fewer:
    schedule_few.py); shared_limit: bytes per block.
    """
    slices = -(-blocks // SLICE_BLOCKS)
    chunks = -(-SLICE_BLOCKS // min(CHUNK // block for _, block in parts))  # of a slice
    height = _height(tokens)

    def fitted(
        mode: int, cuts: tuple[int, ...], window: int, batch: int, items: int, streams: int = WARPS // height
    ) -> Plan | None:
        most = MAX_STAGES if streams * height == WARPS else min(MAX_STAGES * WARPS // streams, _FEW_RINGS_STAGES)
        for stages in range(max(min(most, chunks * -(-items // streams)), 2), 1, -1):
            shared = _shared_bytes(tokens, window, streams, stages)
            if shared <= shared_limit:
                return Plan(mode, cuts, window, batch, streams, stages, shared)
        return None

    found = None
    if slices == 1 or sum(count for count, _ in parts) >= (WARPS - 2) * processors:
        whole = by_tiles(parts, blocks, processors)
        items = max(b - a for a, b in pairwise(whole)) * slices
        found = fitted(OWN, whole, slices, WARPS, items) or fitted(OWN, whole, 1, WARPS, items)
    if found is None:
        cuts, items = _by_slices(parts, blocks, processors, height, tokens)
        for window in (_WINDOW, 2, 1):
            found = found or fitted(SPLIT, cuts, window, _WHOLE, items, min(items, WARPS // height))
    if found is None:
        raise KernelError(f"linear: {tokens} tokens do not fit into {shared_limit} bytes of shared memory")
    return found


def tokens_at_once(shared_limit: int) -> int:
    """The most tokens one launch takes: staged by the slice, they must fit beside two stages of every ring."""
    for tokens in (TOKENS, 32, 16, 8):
        if _shared_bytes(tokens, 1, WARPS // _height(tokens), 2) <= shared_limit:
            return tokens
    raise KernelError(f"linear: the GPU has {shared_limit} bytes of shared memory per block, too few for its rings")


def _height(tokens: int) -> int:
    """Tiles that a warp multiplies at a time."""
    return 2 if tokens >= _PAIRS_FROM else 1


def _shared_bytes(tokens: int, window: int, streams: int, stages: int) -> int:
    padded = next(n for n in (8, 16, 32, 64) if n >= tokens)
    rings = streams * stages * (CHUNK * _height(tokens) + 8)
    return rings + padded * (window * SLICE_BYTES + 16) + window * padded * 4


@functools.cache
def by_tiles(parts: tuple[tuple[int, int], ...], blocks: int, processors: int) -> tuple[int, ...]:
    """Cuts between whole tiles that give the busiest block the fewest bytes.

    A tile of more bytes than that, of a wider format, is a block's only one.
    """
    before = [0, *accumulate(block * blocks for count, block in parts for _ in range(count))]

    def cuts(most: int) -> list[int]:
        found = [0]
        while found[-1] < len(before) - 1 and len(found) <= processors:
            found.append(max(bisect_right(before, before[found[-1]] + most) - 1, found[-1] + 1))
        return found

    low, high = 1, before[-1]
    while low < high:
        middle = (low + high) // 2
        if cuts(middle)[-1] == len(before) - 1:
            high = middle
        else:
            low = middle + 1
    return tuple(cuts(low))


@functools.cache
def _by_slices(
    parts: tuple[tuple[int, int], ...], blocks: int, processors: int, height: int, tokens: int
) -> tuple[tuple[int, ...], int]:
    """Cuts between slices of tiles, all tiles of a slice before the next slice. Also the most items of one block.

    An item is what a warp takes at a time, `height` tiles of a part where there are enough of it for all. Every block
    gets as many bytes; or as many items, where that saves a round of its warps and costs less than the round does.
    """
    widths = [min(SLICE_BLOCKS, blocks - first) for first in range(0, blocks, SLICE_BLOCKS)]
    if len(widths) * sum(-(-count // height) for count, _ in parts) < processors:
        height = 1
    items = [(min(height, count - first), block) for count, block in parts for first in range(0, count, height)]
    before = [0, *accumulate(width * tiles * block for width in widths for tiles, block in items)]
    units = [0, *accumulate(tiles for _ in widths for tiles, _ in items)]
    last = len(before) - 1
    grid = min(processors, last)

    def cost(cuts: list[int]) -> int:
        rounds = max(-(-(b - a) // (WARPS // height)) for a, b in pairwise(cuts))
        return max(before[b] - before[a] for a, b in pairwise(cuts)) + rounds * (_ROUND + tokens * _ROUND_TOKEN)

    equal_bytes = sorted({0, *(bisect_left(before, before[-1] * b // grid) for b in range(1, grid)), last})
    equal_items = [last * b // grid for b in range(grid + 1)]
    cuts = min(equal_bytes, equal_items, key=cost)
    return tuple(units[i] for i in cuts), max(b - a for a, b in pairwise(cuts))
