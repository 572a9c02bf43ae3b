"""What moe_few.cuh computes with indices, step by step in Python: the plan that every block makes for itself, which
warp takes which tile, what its ring is asked for and when, and the slices of a row. The lanes are test_moe_device's.
"""

import pytest
import torch
from test_moe_device import aligned, generator, product_sums, tiled_operand, weights_of

from dsv4.kernels.moe.moe_ref import moe_ref

WARPS, CHUNK_BLOCKS, MOST_CHUNKS, SLICES_OF = 16, 4, 12, {3: 8, 4: 16}
H100_SHARED, PLAN_BYTES = 232448, 4864  # of a block; static, as ptxas counts them
NOBODY = 0x7FFFFFFF


def few_plan(ids, experts):
    """plan_few: (place by pair, places by token, groups (expert, first, count), leaders, places that exist)."""
    pairs, topk = ids.numel(), ids.shape[1]
    expert = [i if 0 <= i < experts else NOBODY for i in ids.flatten().tolist()] + [NOBODY] * (64 - pairs)
    place_of, places, leads, groups = [None] * pairs, [None] * pairs, [0] * 64, {}
    for pair in range(pairs):
        mine = expert[pair]
        place = sum(expert[q] < mine or (expert[q] == mine and q < pair) for q in range(pairs))
        before = sum(expert[q] == mine for q in range(pair))
        alike = sum(expert[q] == mine for q in range(pairs))
        first = pair // topk * topk
        slot = sum(expert[q] < mine or (expert[q] == mine and q < pair) for q in range(first, first + topk))
        places[first + slot] = place if mine != NOBODY else -1
        place_of[pair] = place
        if mine != NOBODY and before % 8 == 0:
            leads[place] = min(alike - before, 8)
            groups[place] = mine, place, leads[place]
    leaders = sum((n != 0) << place for place, n in enumerate(leads))
    return place_of, places, [groups[p] for p in sorted(groups)], leaders, sum(e != NOBODY for e in expert)


class Share:
    """What one block does."""

    def __init__(self, plan, rows, block, grid, room, chunks):
        *_, self.groups, self.leaders, self.places = plan
        self.rows, self.room = rows, room
        total = len(self.groups) * rows[0]
        self.begin, self.end = total * block // grid, total * (block + 1) // grid
        self.first_tile = rows[1] * block // grid
        self.tiles = rows[1] * (block + 1) // grid - self.first_tile
        most = max(self.end - self.begin, self.tiles * len(self.groups), 1)
        rounds = -(-most // WARPS)
        self.warps = -(-most // rounds)
        self.stages = min(chunks // self.warps, MOST_CHUNKS)

    def batch_end(self, start):
        if start + self.room >= self.places:
            return self.places
        return (self.leaders & ((1 << (start + self.room + 1)) - 1)).bit_length() - 1

    def groups_before(self, place):
        return (self.leaders & ((1 << place) - 1)).bit_count()

    def requested(self, warp):
        """Requests::open, again and again: (phase, group, tile)."""
        index, group, groups, places, second = self.begin + warp, 0, 0, 0, False
        while True:
            if not second:
                if index < self.end:
                    yield 0, index // self.rows[0], index % self.rows[0]
                    index += self.warps
                    continue
                second, index = True, warp
            while index >= groups * self.tiles:
                if places >= self.places:
                    return
                group = self.groups_before(places)
                places = self.batch_end(places)
                groups, index = self.groups_before(places) - group, warp
            tile = index // groups
            yield 1, group + index - tile * groups, self.first_tile + tile
            index += self.warps

    def batches(self):
        """(first place, end, first group, groups)"""
        start = 0
        while start < self.places:
            stop = self.batch_end(start)
            first = self.groups_before(start)
            yield start, stop, first, self.groups_before(stop) - first
            start = stop

    def taken(self, warp):
        """The loops of `few`."""
        for at in range(self.begin + warp, self.end, self.warps):
            yield 0, at // self.rows[0], at % self.rows[0]
        for _, _, first, groups in self.batches():
            for at in range(warp, groups * self.tiles, self.warps):
                yield 1, first + at % groups, self.first_tile + at // groups


def room_of(tokens, pairs, blocks, rows, processors=132):
    """fit_few: (rows of mid at a time, chunks, bytes)."""
    room = min(pairs, max((100 << 10) // (blocks[1] * 128 + 16), 8))
    staged = max(tokens * (blocks[0] * 128 + 16), room * (blocks[1] * 128 + 16))
    own = staged + max(tokens, room) * 16 * 4 + -(-rows[1] // processors) * pairs * 32
    chunks = min((H100_SHARED - PLAN_BYTES - 128 - own) // 2304, WARPS * MOST_CHUNKS)
    return room, chunks, chunks * 2304 + own


SHAPES = {"Flash": (256, (256, 256), (64, 32)), "Pro": (384, (384, 448), (112, 48)), "nano": (8, (16, 16), (4, 2))}


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("tokens", [1, 2, 5, 8])
def test_every_tile_is_taken_once_in_the_order_it_was_asked_for(name, tokens):
    experts, rows, blocks = SHAPES[name]
    topk = min(6, experts)
    ids = torch.rand(tokens, experts, generator=generator(tokens)).topk(topk).indices
    for some in (ids, ids[:1].expand(tokens, -1), torch.full((tokens, 6), 3), torch.full((tokens, 2), -1)):
        plan = few_plan(some, experts)
        room, chunks, size = room_of(tokens, some.numel(), blocks, rows)
        assert chunks >= 2 * WARPS and size + PLAN_BYTES <= H100_SHARED and room >= min(some.numel(), 8)
        seen = []
        for block in range(132):
            share = Share(plan, rows, block, 132, room, chunks)
            assert 1 <= share.warps <= WARPS and share.stages >= 2 and share.stages * share.warps <= chunks
            assert share.tiles <= -(-rows[1] // 132)
            assert all(0 < stop - start <= room and groups > 0 for start, stop, _, groups in share.batches())
            for warp in range(share.warps):
                taken = list(share.taken(warp))
                assert taken == list(share.requested(warp))
                seen += taken
        every = [(phase, g, r) for phase in (0, 1) for g in range(len(plan[2])) for r in range(rows[phase])]
        assert sorted(seen) == every
    if name == "Flash" and tokens == 1:  # a token's work: one tile of each projection per warp
        shares = [Share(few_plan(ids, experts), rows, b, 132, 6, room_of(1, 6, blocks, rows)[1]) for b in range(132)]
        assert {share.stages for share in shares if share.warps == 12} == {7}
        assert max(share.end - share.begin for share in shares) == max(share.tiles * 6 for share in shares) == 12


@pytest.mark.parametrize(("tokens", "experts", "topk"), [(1, 8, 2), (8, 5, 3), (8, 12, 8), (7, 300, 6)])
def test_the_plan_is_the_one_of_align(tokens, experts, topk):
    ids = torch.rand(tokens, experts, generator=generator(tokens)).topk(topk).indices
    ids[0, 0] = -1
    ids[-1, -1] = experts
    if tokens == 8:
        ids[:, 1] = 1  # more than one group
        ids[:, 2] = 1
    by_place, places, groups = aligned(ids, experts, 8)
    found = few_plan(ids, experts)
    assert found[1] == places and found[2] == groups
    assert [found[0].index(i) for i in range(found[4])] == by_place[: found[4]]


def sliced(blocks):
    """tile_product: [(slice, its blocks)], as its loop ends them."""
    cuts = 3 if blocks <= 64 else 4
    part, stop, found, current, done = 0, blocks >> cuts, [], [], 0
    while stop == 0:
        part, stop = part + 1, (part + 2) * blocks >> cuts

    def end():
        nonlocal part, stop, current
        found.append((part, current))
        current = []
        while stop <= done < blocks:
            part, stop = part + 1, (part + 2) * blocks >> cuts

    while done < blocks:
        if stop - done >= CHUNK_BLOCKS:
            current += range(done, done + CHUNK_BLOCKS)
            done += CHUNK_BLOCKS
            if done == stop:
                end()
        else:
            for _ in range(done, min(blocks, done + CHUNK_BLOCKS)):
                current.append(done)
                done += 1
                if done == stop:
                    end()
    assert not current
    return found


def test_slices_are_those_of_the_streamed_form():
    for blocks in range(1, 129):
        slices = 8 if blocks <= 64 else 16
        cut = [(s, list(range(s * blocks // slices, (s + 1) * blocks // slices))) for s in range(slices)]
        assert sliced(blocks) == [(s, part) for s, part in cut if part]
        assert all(len(part) <= 8 for _, part in cut)  # a warp stages a slice, 16 columns a lane


@pytest.mark.parametrize(("hidden", "inner", "tokens"), [(80, 48, 3), (256, 32, 5)])
def test_few_tokens_get_what_the_twin_computes(hidden, inner, tokens):
    operand, x = tiled_operand(*weights_of(3, hidden, inner)), torch.randn(tokens, hidden, generator=generator(1))
    ids = torch.rand(tokens, 3, generator=generator(2)).topk(2).indices
    weights = torch.rand(tokens, 2, generator=generator(4))
    shared = torch.randn(tokens, hidden, generator=generator(5))
    plan = few_plan(ids, 3)
    both, grid = (operand.w13, operand.down), 3
    rows = [w.tiles.shape[1] for w in both]
    shares = [Share(plan, rows, b, grid, 8, 64) for b in range(grid)]
    pair_at = {place: pair for pair, place in enumerate(plan[0])}
    mid = torch.zeros(tokens * 2, inner, dtype=torch.float64)
    results = torch.zeros(tokens * 2, hidden, dtype=torch.float64)
    for phase, inputs in ((0, x.double()), (1, mid)):
        w = both[phase]
        for share in shares:
            for phase_, group, tile in (unit for warp in range(share.warps) for unit in share.taken(warp)):
                expert, first, count = share.groups[group]
                if phase_ != phase:
                    continue
                lanes = torch.zeros(32, 4, dtype=torch.float64)
                for block in (b for _, blocks in sliced(w.blocks) for b in blocks):
                    columns = torch.zeros(8, 64, dtype=torch.float64)
                    for m in range(8):
                        place = first + min(m, count - 1)
                        row = inputs[place if phase else pair_at[place] // 2][64 * block : 64 * block + 64]
                        columns[m, : len(row)] = row
                    lanes += product_sums(w.tiles[expert, tile, block], columns)
                for lane in range(32):
                    g, t = divmod(lane, 4)
                    for i in range(2):
                        if (m := 2 * t + i) >= count:
                            break
                        low, high = lanes[lane, i], lanes[lane, i + 2]
                        if phase:
                            results[first + m, 16 * tile + g] = low * w.alpha[expert, 0]
                            results[first + m, 16 * tile + g + 8] = high * w.alpha[expert, 0]
                        else:
                            gate = (low * w.alpha[expert, 0]).clamp(max=10.0)
                            up = (high * w.alpha[expert, 1]).clamp(-10.0, 10.0)
                            weight = weights.flatten()[pair_at[first + m]]
                            mid[first + m, 8 * tile + g] = torch.nn.functional.silu(gate) * up * weight
    out = shared.double().clone()
    for token in range(tokens):
        out[token] += sum(results[place] for place in plan[1][2 * token : 2 * token + 2] if place >= 0)
    truth = moe_ref(x, operand, ids, weights, shared, limit=10.0)
    assert (out - truth).abs().max() < 1e-5 * truth.abs().max()
