"""What the moe kernels compute with indices, step by step in Python: who goes where, which lane holds which weight,
which thread finishes which element. The arithmetic of the lanes is w4.cuh's and mma.cuh's; the truth is the twin.
"""

import re
from pathlib import Path

import pytest
import torch

from dsv4.errors import KernelError
from dsv4.kernels.moe import launch
from dsv4.kernels.moe.moe import moe
from dsv4.kernels.moe.moe_ref import down_ref, gate_up_ref, order_of
from dsv4.kernels.moe.operand import ExpertsOperand, experts_operand
from dsv4.kernels.moe.tiled import tiled_experts
from dsv4.quant.weights import FP8Weight, MXFP4Weight, NVFP4Weight

SLICES, TOKENS, WARP = 8, 8, 32
INCLUDE = Path(launch.__file__).parents[1] / "include" / "dsv4"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def weights_of(experts, hidden, inner, format=NVFP4Weight):
    g = generator(3)
    w1, w3 = (format.quantize(torch.randn(experts, inner, hidden, generator=g) * 0.1) for _ in range(2))
    return w1, format.quantize(torch.randn(experts, hidden, inner, generator=g) * 0.1), w3


def tiled_operand(w1, w2, w3):
    nbytes = w1.nbytes + w2.nbytes + w3.nbytes
    return ExpertsOperand(None, "none", "none", tiled_experts(w1=w1, w3=w3), tiled_experts(w2=w2), nbytes)


def aligned(ids, experts, group, threads=1024):
    """moe_align.cuh: pairs by place, places by token, groups (expert, first, count)."""
    pairs, topk = ids.numel(), ids.shape[1]
    flat = [int(i) if 0 <= i < experts else -1 for i in ids.flatten().tolist()]
    by_place, places = [None] * pairs, [None] * pairs
    groups = []
    for block in range(-(-pairs // threads)):
        begin = block * threads
        every, earlier = [0] * experts, [0] * experts
        for pair, expert in enumerate(flat):
            if expert >= 0:
                every[expert] += 1
                earlier[expert] += pair < begin
        starts = [sum(every[:e]) for e in range(experts)]
        if block == 0:
            for e in range(experts):
                for i in range(-(-every[e] // group)):
                    groups.append((e, starts[e] + i * group, min(group, every[e] - i * group)))
        for thread in range(min(threads, pairs - begin)):
            pair, expert = begin + thread, flat[begin + thread]
            place = -1
            if expert >= 0:
                place = starts[expert] + earlier[expert] + sum(flat[p] == expert for p in range(begin, pair))
                by_place[place] = pair
            first = pair // topk * topk
            key = [flat[p] % 2**32 for p in range(first, first + topk)]
            mine = key[pair - first]
            slot = sum(k < mine or (k == mine and first + i < pair) for i, k in enumerate(key))
            places[first + slot] = place
    return by_place, places, groups


@pytest.mark.parametrize("group", [8, 128])
@pytest.mark.parametrize(("tokens", "experts", "topk"), [(1, 8, 2), (9, 5, 3), (70, 12, 6), (40, 300, 6)])
def test_pairs_are_sorted_by_expert_and_grouped(tokens, experts, topk, group):
    ids = torch.rand(tokens, experts, generator=generator(tokens)).topk(topk).indices
    by_place, places, groups = aligned(ids, experts, group, threads=64)
    order = order_of(ids)
    assert by_place == order.pairs.tolist()
    expert = ids.flatten()[order.pairs].tolist()
    seen = []
    for e, first, count in groups:
        assert 0 < count <= group and expert[first : first + count] == [e] * count
        seen += range(first, first + count)
    assert seen == list(range(tokens * topk))
    for t in range(tokens):
        mine = places[t * topk : (t + 1) * topk]
        assert mine == sorted(mine) and {by_place[p] // topk for p in mine} == {t}
    assert len(groups) <= min(ids.numel(), ids.numel() // group + min(experts, ids.numel()))


def test_an_expert_that_does_not_exist_is_left_out():
    ids = torch.tensor([[3, -1, 0], [9, 2, 3]])
    by_place, places, groups = aligned(ids, 4, 8)
    assert by_place == [2, 4, 0, 5, None, None]
    assert places == [0, 2, -1, 1, 3, -1]
    assert groups == [(0, 0, 1), (2, 1, 1), (3, 2, 2)]


def halves(bits):
    return bits.to(torch.int16).view(torch.float16).double()


def lane_values(block):
    """w4.cuh: A of the four products of one block u8 [576]: [product, lane, register, half] float64."""
    words = block[:512].view(WARP, 4, 4).long()
    words = (words << torch.tensor([0, 8, 16, 24])).sum(-1)  # [lane, product]
    bytes_ = block[512:].view(WARP, 2).view(torch.float8_e4m3fn).double()
    codes = [
        words & 0x8E008E00,
        (words << 3) & 0x8E008E00,
        ((words & 0x40384038) * 66) & 0x8E008E00,
        ((words & 0x20072007) * 516) & 0x8E008E00,
    ]
    out = torch.empty(4, WARP, 4, 2, dtype=torch.float64)
    for i, code in enumerate(codes):
        for h in range(2):
            out[:, :, i, h] = (halves(code >> (16 * h) & 0xFFFF) * bytes_[:, i % 2].unsqueeze(-1)).T * 2.0**14
    return out


def product_sums(block, x):
    """mma.cuh: block u8 [576] times x [8 tokens, 64 columns] -> the accumulators [lane, 4] of a warp."""
    a = lane_values(block)
    c = torch.zeros(16, TOKENS, dtype=torch.float64)
    for lane in range(WARP):
        g, t = lane // 4, lane % 4
        for j in range(4):
            for i in range(4):
                for h in range(2):
                    # the B register with the same slot: b[p], half h, holds column 16 t + 4 j + 2 p + h of every token
                    c[g + 8 * (i % 2)] += a[j, lane, i, h] * x[:, 16 * t + 4 * j + 2 * (i // 2) + h]
    lanes = torch.arange(WARP)
    return torch.stack([c[lanes // 4 + 8 * (i // 2), 2 * (lanes % 4) + i % 2] for i in range(4)], dim=-1)


def streamed(weight, rows_of, plan, tiles_of_a_block):
    """moe_stream.cuh for every block of the grid: finished sums {(place, tile, row, half): value} without alpha."""
    groups = plan[2]
    per_expert, blocks = weight.tiles.shape[1:3]
    total, done = len(groups) * per_expert, {}
    grid = -(-total // tiles_of_a_block)
    for block in range(grid):
        begin, end = total * block // grid, total * (block + 1) // grid
        for tile in range(begin, end):
            expert, first, count = groups[tile // per_expert]
            r = tile % per_expert
            parts = torch.zeros(SLICES, WARP, 4, dtype=torch.float64)
            for warp in range(SLICES):
                start, stop = warp * blocks // SLICES, (warp + 1) * blocks // SLICES
                for kb in range(start, stop):
                    x = torch.zeros(TOKENS, 64, dtype=torch.float64)
                    for token in range(count):
                        row = rows_of(first + token)[64 * kb : 64 * kb + 64]
                        x[token, : len(row)] = row
                    parts[warp] += product_sums(weight.tiles[expert, r, kb], x)
            sums = parts.sum(0).flatten()
            for thread in range(128):
                warp, lane = divmod(thread, WARP)
                l = warp % 4 * 8 + lane // 4  # noqa: E741
                row, half, m = l // 4, lane // 2 % 2, 2 * (l % 4) + lane % 2
                if m < count:
                    key = first + m, r, row, half
                    assert key not in done
                    done[key] = float(sums[4 * l + 2 * half + lane % 2])
    return done


@pytest.mark.parametrize(("hidden", "inner", "tokens"), [(80, 48, 3), (256, 32, 5)])
def test_a_streamed_tile_holds_what_the_twin_computes(hidden, inner, tokens):
    operand, x = tiled_operand(*weights_of(3, hidden, inner)), torch.randn(tokens, hidden, generator=generator(1))
    ids = torch.rand(tokens, 3, generator=generator(2)).topk(2).indices
    weights, shared = torch.rand(tokens, 2, generator=generator(4)), torch.zeros(tokens, hidden)
    plan, order = aligned(ids, 3, TOKENS), order_of(ids)
    first, second = operand.w13, operand.down
    sums = streamed(first, lambda place: x[plan[0][place] // 2].double(), plan, 3)
    expert = {place: e for e, start, count in plan[2] for place in range(start, start + count)}
    mid = torch.zeros(tokens * 2, inner)
    for place in range(tokens * 2):
        for r in range(inner // 8):
            for row in range(8):
                gate, up = (sums[place, r, row, half] * float(first.alpha[expert[place], half]) for half in (0, 1))
                gate, up = torch.tensor(gate).clamp(max=10.0), torch.tensor(up).clamp(-10.0, 10.0)
                a = torch.nn.functional.silu(gate) * up * weights.flatten()[plan[0][place]]
                mid[place, 8 * r + row] = a
    truth = gate_up_ref(x, operand, order, weights, 10.0)
    assert (mid - truth).abs().max() < 1e-5 * truth.abs().max()
    sums = streamed(second, lambda place: truth[place].double(), plan, 5)
    out = torch.zeros(tokens, hidden, dtype=torch.float64)
    for (place, r, row, half), value in sums.items():
        out[plan[0][place] // 2, 16 * r + row + 8 * half] += value * float(second.alpha[expert[place], 0])
    truth = down_ref(truth, operand, order, shared)
    assert (out - truth).abs().max() < 1e-5 * truth.abs().max()


@pytest.mark.parametrize("format", [NVFP4Weight, MXFP4Weight])
def test_tiles_multiply_as_the_stored_weights_do(format):
    w = weights_of(4, 96, 64, format)
    x, ids = torch.randn(6, 96, generator=generator(5)), torch.randint(0, 4, (6, 2), generator=generator(6))
    weights, shared = torch.rand(6, 2, generator=generator(7)), torch.randn(6, 96, generator=generator(8))
    from_tiles = moe(x, tiled_operand(*w), ids, weights, shared, limit=10.0)
    from_dense = moe(x, experts_operand(*w, act="bf16"), ids, weights, shared, limit=10.0)
    assert (from_tiles - from_dense).abs().max() < 1e-5 * from_dense.abs().max()


def test_bytes_are_those_of_the_stored_form():
    w1, w2, w3 = weights_of(4, 64, 64)
    operand = tiled_operand(w1, w2, w3)
    assert operand.w13.tiles.numel() + operand.down.tiles.numel() == sum(
        w.codes.numel() + w.scale.numel() for w in (w1, w2, w3)
    )
    assert operand.nbytes == experts_operand(w1, w2, w3, act="bf16").nbytes


def test_experts_in_other_formats_are_refused_by_name():
    with pytest.raises(KernelError, match="experts w2 are stored as fp8"):
        tiled_experts(w2=FP8Weight.quantize(torch.randn(2, 128, 128, generator=generator(9))))
    wide = torch.ones(1, 16, 64)
    wide[0, 0, 32:] = 2.0**-40
    with pytest.raises(KernelError, match="experts w2: the MXFP4 scales"):
        tiled_experts(w2=MXFP4Weight.quantize(wide))


@pytest.mark.parametrize(("tokens", "hidden", "group"), [(1, 128, 8), (128, 128, 8), (129, 128, 128), (1, 8256, 128)])
def test_few_tokens_stream_and_many_are_tiled(tokens, hidden, group):
    operand = tiled_operand(*weights_of(2, hidden, 16))
    ids = torch.zeros(tokens, 2, dtype=torch.int64)
    assert launch.work_of(operand, ids, torch.ones(tokens, 2), 10.0).group == group


def step_of(block):
    """wide_product.cuh: a row's 64 columns in the order in which `to_half` writes them."""
    at = torch.arange(32)
    pairs = at % 4 * 8 + at // 8 * 2 + at // 4 % 2
    return torch.stack([block[2 * pairs], block[2 * pairs + 1]], dim=-1).flatten()


def test_a_step_of_many_tokens_meets_the_columns_of_the_weights():
    """Half s of product j is slot s of mma.cuh, which carries the column that the weights have there."""
    step = step_of(torch.arange(64))
    for j in range(4):
        for t in range(4):
            for p in range(2):
                for h in range(2):
                    assert step[16 * j + 8 * p + 2 * t + h] == 16 * t + 4 * j + 2 * p + h


def test_a_result_that_does_not_start_at_16_bytes_is_refused():
    w, to = tiled_operand(*weights_of(2, 64, 16)).w13, torch.empty(33, dtype=torch.bfloat16)
    with pytest.raises(KernelError, match="'out' must start at a multiple of 16 bytes; it starts 2 beyond one"):
        launch._projection(w, torch.zeros(2, 64, dtype=torch.bfloat16), None, to[1:].view(2, 16))


WRITTEN_ON_THE_DEVICE = r"\b(plan\.|places\[|group_at\(|source<|job\.x\b|job\.weights|shared\[|ids\[)"


EARLY, LATE = (f"\n    if ({when}) wait_for_previous();" for when in ("!planned", "planned"))


def test_nothing_is_read_before_its_turn():
    """A plan read before align had ended named experts that do not exist: whoever may start early waits first. Where
    the plan was complete before the kernel in front began (planned), it may be read, and nothing else.
    """
    waiting = 0
    for source in (*Path(launch.__file__).parent.glob("*.cu"), *INCLUDE.glob("moe_*.cuh")):
        for kernel in re.split(r"\n__global__|\ntemplate[^\n]*\n__global__", source.read_text())[1:]:
            text = re.sub(r"//.*", "", kernel)
            if "wait_for_previous" in text or "take_turn" in text:
                waiting += 1
                before, *after = re.split(r"\n    (?:wait_for_previous|take_turn)\(\);", text)  # without conditions
                if EARLY in text:
                    before, meanwhile = text.split(EARLY)
                    meanwhile, *after = meanwhile.split(LATE)
                    assert not re.search(WRITTEN_ON_THE_DEVICE, meanwhile.replace("plan.", "")), source.name
                assert after and not re.search(WRITTEN_ON_THE_DEVICE, before.partition(") {\n")[2]), source.name
    assert waiting >= 2
