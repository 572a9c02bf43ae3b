"""How a launch of up to eight tokens is spread over a GPU (linear_few.cuh): clusters take tiles, their blocks slices.

More blocks in a cluster give finer shares where tiles are few, and each stages fewer columns of the tokens; what they
cost is that sums meet across blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import pairwise

from dsv4.errors import KernelError
from dsv4.kernels.linear.schedule import CHUNK, MEET, OWN, SLICE_BLOCKS, SLICE_BYTES, WARPS, Plan, by_tiles
from dsv4.kernels.tiles import NVFP4_BYTES

FEW_TOKENS = 8  # constant of include/dsv4/linear_few.cuh
CLUSTERS = (1, 2, 4, 8)  #: blocks of a cluster
_NEIGHBOURS = 2  # more may have to wait until so many processors near each other have room: only where memory is short
_MEETING = 22 << 10  # bytes of weights that a block reads while a cluster meets
_STAGED = 2.5  # bytes of tokens that are staged in the time of one byte of weights
_ALONE = 0.6  # time of a byte of a wide tile, which is read on when others are done, of any byte's
_PAIR = 1.75  # time of two tiles together, of one tile's
_MOST_STAGES = 5
_LEAST_STAGES = {1: 3, 2: 2}  # by height: so much has to be under way while other warps and sums wait
_PLACE_BYTES = 48  # of each warp (Place in linear_few.cuh)


@functools.cache
def plan_few(parts: tuple[tuple[int, int], ...], blocks: int, tokens: int, processors: int, shared_limit: int) -> Plan:
    """As schedule.plan, for 1 to FEW_TOKENS tokens; cuts are those of clusters.

    A block takes more than half of the shared memory, so that no processor gets two and another none.
    """
    slices = -(-blocks // SLICE_BLOCKS)
    tiles = sum(count for count, _ in parts)
    mixed = any(block != NVFP4_BYTES for _, block in parts)
    if tiles >= 2 * (WARPS - 2) * processors:
        whole = by_tiles(parts, blocks, processors)
        found = _fitted(OWN, whole, slices, tokens, 1, (2,), {2: _MOST_STAGES}, shared_limit)
        if found is not None:
            return found
    ways = sorted(_spreads(parts, blocks, tokens, processors), key=lambda way: (max(way[1], _NEIGHBOURS), way))
    for roomy in (True, False):  # what leaves room for all sums at once and deep rings, before what does not
        for _, ranks, cuts in ways:
            window = -(-slices // ranks)
            most = max(b - a for a, b in pairwise(cuts))
            rounds = {height: -(-(-(-most // height) * window) // WARPS) for height in (1, 2)}
            heights: tuple[int, ...] = (2, 1) if rounds[2] * _PAIR < rounds[1] else (1, 2)
            chunks = {height: rounds[height] * SLICE_BLOCKS * NVFP4_BYTES // CHUNK for height in heights}
            if mixed:
                heights, chunks = (1,), {1: _MOST_STAGES}  # a slice of BF16 is many chunks
            found = _fitted(MEET, cuts, window, tokens, ranks, heights, chunks, shared_limit, roomy)
            if found is None and roomy and ranks == 1 and not mixed and WARPS - 2 <= most <= WARPS:
                found = _fitted(OWN, cuts, slices, tokens, 1, (1,), {1: _MOST_STAGES}, shared_limit)
            if found is not None:
                return found
    raise KernelError(f"linear: {tokens} tokens do not fit into {shared_limit} bytes of shared memory")


def _spreads(
    parts: tuple[tuple[int, int], ...], blocks: int, tokens: int, processors: int
) -> Iterator[tuple[float, int, tuple[int, ...]]]:
    """(cost, blocks of a cluster, cuts): bytes of weights that the busiest block could read meanwhile."""
    slices = -(-blocks // SLICE_BLOCKS)
    bytes_of = [block * blocks for count, block in parts for _ in range(count)]
    for ranks in CLUSTERS:
        if ranks > slices or ranks > processors:
            continue
        cuts = by_tiles(parts, blocks, processors // ranks)
        window = -(-slices // ranks)
        busiest = max(sum(bytes_of[a:b]) for a, b in pairwise(cuts))
        pace = _ALONE if ranks == 1 and busiest == max(bytes_of) > min(bytes_of) else 1.0
        yield (
            busiest * pace * window / slices + tokens * window * SLICE_BYTES / _STAGED + (ranks > 1) * _MEETING,
            ranks,
            cuts,
        )


def _fitted(
    mode: int,
    cuts: tuple[int, ...],
    window: int,
    tokens: int,
    ranks: int,
    heights: tuple[int, ...],
    chunks: dict[int, int],
    shared_limit: int,
    roomy: bool = False,
) -> Plan | None:
    """The first height, and its deepest rings of up to `chunks`, that fit. roomy: only beside the sums of all tiles."""
    most = max(b - a for a, b in pairwise(cuts))
    for height in heights:
        deepest = min(max(chunks[height], 2), _MOST_STAGES)
        for stages in range(deepest, min(deepest, _LEAST_STAGES[height]) - 1 if roomy else 0, -1):
            rest = tokens * (window * SLICE_BYTES + 16) + window * FEW_TOKENS * 4 + WARPS * (8 * stages + _PLACE_BYTES)
            rest += (WARPS * stages + 1) * CHUNK * height  # and a spare stage
            slot = 0 if mode == OWN else window * tokens * 64
            batch = most if mode == OWN else min(most, (shared_limit - rest) // slot)
            if rest + batch * slot <= shared_limit and batch >= (most if roomy else min(most, height)):
                alone = max(rest + batch * slot, shared_limit // 2 + 1024)
                return Plan(mode, cuts, window, stages, alone, batch, ranks, height)
    return None
