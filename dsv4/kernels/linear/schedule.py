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
from dsv4.kernels.tiles import NVFP4_BYTES

OWN, MEET, SPLIT, DENSE, ROUND = 0, 1, 2, 3, 4  # Mode in linear.cu
WARPS, CHUNK, SLICE_BLOCKS, SLICE_BYTES = 16, 2304, 8, 1024  # constants of include/dsv4/linear.cuh; a slice of a token
TOGETHER = 4  #: warps that multiply together, each a tile: constant of include/dsv4/linear_many.cuh
TOKENS = 64  #: at most, in one launch
CONVERTED = 16  #: at most, that blocks with whole tiles convert: constant of include/dsv4/linear_many.cuh
_MAX_STAGES = 5  # of the rings
_REQUESTS_BYTES = 56  # of each warp (ManyRequests in linear_many.cuh)
_ALIGNMENT = 1 << 10
_STAGED_ROWS = 64  #: tokens of slices in shared memory or on their way (OWN); at least two slices
_ROUND, _ROUND_TOKEN = 16 << 10, 1 << 10  #: bytes that a block reads while a warp multiplies another item


@dataclass(frozen=True)
class Plan:
    """cuts: block b takes the units cuts[b] .. cuts[b + 1]; tiles, or with SPLIT slice * tiles + tile."""

    mode: int
    cuts: tuple[int, ...]
    window: int
    stages: int
    shared_bytes: int
    batch: int = 0  # of up to eight tokens, as what follows: tiles whose sums wait at a time
    ranks: int = 1  # blocks of a cluster, of which cuts are
    height: int = 1  # tiles that a warp multiplies at a time

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
    tiles = sum(count for count, _ in parts)
    if slices == 1 or tiles >= (WARPS - 2) * processors:
        mode, cuts = OWN, by_tiles(parts, blocks, processors)
        window = min(slices, max(_STAGED_ROWS // padded_tokens(tokens), 2))
        most = chunks * slices * -(-max(b - a for a, b in pairwise(cuts)) // WARPS)
    else:
        mode, cuts = SPLIT, _by_slices(parts, blocks, processors, tokens)
        window = 2 if any(a // tiles != (b - 1) // tiles for a, b in pairwise(cuts)) else 1
        most = chunks * -(-max(b - a for a, b in pairwise(cuts)) // WARPS)
    for room in range(window, 0, -1):
        for stages in range(max(min(most, _MAX_STAGES), 2), 1, -1):
            shared = _shared_bytes(tokens, room, stages)
            if shared <= shared_limit:
                return Plan(mode, cuts, room, stages, shared)
    raise KernelError(f"linear: {tokens} tokens do not fit into {shared_limit} bytes of shared memory")


def padded_tokens(tokens: int) -> int:
    """Tokens of the form of the kernel that takes so many."""
    return next(n for n in (16, 32, 64) if n >= tokens)


def tokens_at_once(shared_limit: int) -> int:
    """The most tokens one launch takes: staged by the slice, they must fit beside two stages of every ring."""
    for tokens in (TOKENS, 32, 16):
        if _shared_bytes(tokens, 1, 2) <= shared_limit:
            return tokens
    raise KernelError(f"linear: the GPU has {shared_limit} bytes of shared memory per block, too few for its rings")


def _shared_bytes(tokens: int, window: int, stages: int) -> int:
    x = window * (padded_tokens(tokens) * (SLICE_BYTES + 4) + 12)  # a barrier and a count
    return _ALIGNMENT + x + WARPS * (stages * (CHUNK + 8) + _REQUESTS_BYTES)


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
def _by_slices(parts: tuple[tuple[int, int], ...], blocks: int, processors: int, tokens: int) -> tuple[int, ...]:
    """Cuts between slices of tiles, all tiles of a slice before the next slice: every block gets as many bytes, or as
    many tiles, where that saves a round of its warps and costs less than the round does.
    """
    widths = [min(SLICE_BLOCKS, blocks - first) for first in range(0, blocks, SLICE_BLOCKS)]
    found: list[tuple[int, list[int]]] = []
    for height in (TOGETHER, 2, 1):  # tiles of NVFP4 that stay together
        steps = [height if block == NVFP4_BYTES else 1 for _, block in parts]
        items = [
            (min(step, count - first), block)
            for step, (count, block) in zip(steps, parts, strict=True)
            for first in range(0, count, step)
        ]
        before = [0, *accumulate(width * tiles * block for width in widths for tiles, block in items)]
        units = [0, *accumulate(tiles for _ in widths for tiles, _ in items)]
        last = len(before) - 1
        grid = min(processors, last)
        full = [*range(0, last, -(-last // grid)), last]  # often leaves every block within a slice
        equal_bytes = sorted({0, *(bisect_left(before, before[-1] * b // grid) for b in range(1, grid)), last})
        equal_items = [last * b // grid for b in range(grid + 1)]
        for cuts in (full, equal_bytes, equal_items):
            rounds = max(-(-(units[b] - units[a]) // WARPS) for a, b in pairwise(cuts))
            most = max(before[b] - before[a] for a, b in pairwise(cuts))
            found.append((most + rounds * (_ROUND + tokens * _ROUND_TOKEN), [units[i] for i in cuts]))
    return tuple(min(found, key=lambda way: way[0])[1])
