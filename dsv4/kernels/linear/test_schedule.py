"""How a launch is spread over a GPU: everything once, nobody overloaded, within shared memory; and the packed form."""

import ctypes
from itertools import pairwise

import pytest
import torch

from dsv4.errors import KernelError
from dsv4.kernels.linear.launch import Launcher, _Part
from dsv4.kernels.linear.schedule import MEET, OWN, SPLIT, plan, tokens_at_once
from dsv4.kernels.linear.schedule_few import FEW_TOKENS, plan_few
from dsv4.kernels.linear.test_linear import weights_of
from dsv4.kernels.linear.tiled import TiledRows, tiled, tiled_groups
from dsv4.kernels.loader import noted
from dsv4.quant.weights import FP8Weight, MXFP4Weight, PlainWeight

H200, RTX = (132, 231424), (188, 100352)  # processors, bytes of shared memory for a block
OPERANDS = {
    "in_proj": (((64, 576), (32, 576), (128, 576), (32, 576), (4, 2048)), 64),
    "native": (((64, 1024), (32, 1024), (128, 2048), (4, 2048)), 64),
    "wq_b": (((2048, 576),), 16),
    "head": (((8080, 576),), 64),
    "wo_b": (((256, 576),), 128),
    "gate": (((16, 2048),), 64),
    "tiny": (((1, 576), (3, 1024), (1, 2048)), 3),
    "wo_a": (((64, 576),) * 8, 64),
    "ragged": (((9, 576),), 35),
}


def spread(name, tokens, gpu):
    return (plan_few if tokens <= FEW_TOKENS else plan)(*OPERANDS[name], tokens, *gpu)


@pytest.mark.parametrize("gpu", [H200, RTX, (3, 231424)], ids=str)
@pytest.mark.parametrize("name", OPERANDS)
@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 33, 64])
def test_every_unit_goes_to_one_block(name, tokens, gpu):
    parts, blocks = OPERANDS[name]
    tokens = min(tokens, tokens_at_once(gpu[1]))
    how = spread(name, tokens, gpu)
    tiles = sum(count for count, _ in parts)
    units = tiles * -(-blocks // 8) if how.mode == SPLIT else tiles
    assert how.cuts[0] == 0 and how.cuts[-1] == units and list(how.cuts) == sorted(set(how.cuts))
    assert how.grid <= gpu[0] and how.shared_bytes <= gpu[1] and how.stages >= (1 if tokens <= FEW_TOKENS else 2)
    assert (how.mode == MEET or how.mode == OWN) if tokens <= FEW_TOKENS else how.mode != MEET
    assert how.ranks * how.window >= -(-blocks // 8) or how.mode != MEET


def test_blocks_get_equal_shares():
    for name, share in (("wq_b", 1.05), ("head", 1.02), ("wo_b", 1.04), ("gate", 1.1), ("in_proj", 2), ("native", 1.3)):
        parts, blocks = OPERANDS[name]
        for tokens in (1, 64):
            how = spread(name, tokens, H200)
            size = [block * blocks for count, block in parts for _ in range(count)]
            if how.mode == SPLIT:
                size = [block * 8 for _ in range(blocks // 8) for count, block in parts for _ in range(count)]
            busiest = max(sum(size[a:b]) for a, b in pairwise(how.cuts)) / how.ranks
            # whole tiles of BF16 are one to a block, however few they are
            assert busiest <= max(share * sum(size) / H200[0], max(size) if how.mode == MEET else 0)


def test_many_tokens_take_no_more_rounds_than_they_must():
    for name in ("in_proj", "wo_b", "wo_a"):
        parts, blocks = OPERANDS[name]
        how = plan(parts, blocks, 64, *H200)
        tiles = sum(count for count, _ in parts)
        busiest = max(b - a for a, b in pairwise(how.cuts))
        assert how.mode == SPLIT and -(-busiest // 16) == -(-tiles * (blocks // 8) // (16 * H200[0]))


def test_blocks_of_many_tokens_stay_within_a_slice_where_that_costs_nothing():
    for name in ("wo_b", "wo_a"):
        how = plan(*OPERANDS[name], 64, *H200)
        assert (how.window, how.stages) == (1, 4)  # one slice of 64 tokens leaves room for all weights of a warp
    assert plan(*OPERANDS["wq_b"], 64, *H200).window == 2


def test_up_to_eight_tokens_never_share_a_processor():
    for name in OPERANDS:
        for tokens in (1, 8):
            assert 2 * (spread(name, tokens, H200).shared_bytes + 1024) > 228 << 10


def test_up_to_eight_tokens_take_pairs_of_tiles_where_warps_have_enough():
    heights = {name: spread(name, 1, H200).height for name in OPERANDS}
    assert heights["wq_b"] == heights["wo_a"] == heights["wo_b"] == heights["head"] == 2
    assert heights["in_proj"] == heights["gate"] == 1  # BF16 beside NVFP4: one by one
    assert spread("wo_b", 8, H200).ranks == 2 and spread("wo_b", 1, H200).ranks == 1  # halves what is staged


def test_eight_tokens_have_room_for_all_sums_and_for_weights_on_their_way():
    wide = (((2048, 576),), 64)
    assert (plan_few(*wide, 4, *H200).mode, plan_few(*wide, 8, *H200).mode) == (MEET, OWN)  # OWN has no sums to keep
    for shape in (wide, OPERANDS["wo_b"], OPERANDS["wo_a"]):
        for tokens in (4, 5, 6, 7, 8):
            how = plan_few(*shape, tokens, *H200)
            assert how.batch == max(b - a for a, b in pairwise(how.cuts)) and how.stages >= {1: 3, 2: 2}[how.height]


def test_large_matrices_stay_whole_and_few_tokens_meet_in_shared_memory():
    modes = {name: [spread(name, tokens, H200).mode for tokens in (1, 64)] for name in OPERANDS}
    assert modes["head"] == [OWN, OWN] and modes["wq_b"] == [MEET, OWN]
    assert modes["wo_a"] == modes["wo_b"] == modes["gate"] == [MEET, SPLIT]


def test_few_rows_have_several_slices_on_their_way():
    windows = {tokens: plan(*OPERANDS["head"], tokens, *H200).window for tokens in (9, 16, 17, 32, 33, 64)}
    assert windows == {9: 4, 16: 4, 17: 2, 32: 2, 33: 2, 64: 2}
    assert plan(*OPERANDS["wq_b"], 16, *H200).window == 2  # no more than there are
    assert plan(*OPERANDS["head"], 16, *RTX).window == 1


def test_equal_inputs_are_staged_once_for_each_form():
    weights = [weights_of(16, 64)[format] for format in ("nvfp4", "fp8", "bf16", "nvfp4", "bf16")]
    launcher = Launcher([tiled(w) for w in weights])
    x = torch.zeros(20, 128, dtype=torch.bfloat16)
    inputs = [x[:, :64], x[:, :64], x[:, :64], x[:, 64:], x[:, :64]]
    launcher._point(slice(3, 20), inputs, [None] * 5, [torch.empty(20, 16)] * 5)
    assert [row.input for row in launcher.table] == [0, 0, 1, 2, 1]


def test_a_kernel_in_front_stages_tokens_but_few_of_few_columns():
    x = torch.zeros(64, 96, dtype=torch.bfloat16)

    def scratch(tokens, *formats):
        launcher = Launcher([tiled(weights_of(40, 96)[format]) for format in formats])
        how = plan(launcher.shapes, launcher.blocks, tokens, *H200)
        launcher._point(slice(tokens), [x] * len(formats), [None] * len(formats), [torch.empty(64, 40)] * len(formats))
        with noted() as launches:
            launcher._launch(how, tokens)
        assert how.mode == OWN and how.window == 1
        return launches[0].arguments[5]

    assert scratch(9, "nvfp4") is None and scratch(16, "nvfp4", "fp8") is None
    assert len(scratch(17, "nvfp4")) == 32 * 257 and len(scratch(16, "nvfp4", "bf16")) == 2 * 16 * 257


def test_a_gpu_without_room_is_refused():
    with pytest.raises(KernelError, match="49152 bytes of shared memory per block, too few"):
        tokens_at_once(49152)


def test_the_structure_is_that_of_the_header():
    assert ctypes.sizeof(_Part) == 96


@pytest.mark.parametrize(("n", "k"), [(40, 96), (256, 320)])
def test_packed_weights_hold_the_values(n, k):
    x = torch.randn(3, k)
    for format, weight in weights_of(n, k).items():
        if format == "f32":
            with pytest.raises(KernelError, match="holds values that BF16 does not"):
                tiled(weight)
            continue
        packed = tiled(weight)
        assert packed.nbytes == weight.nbytes and packed.exact
        assert torch.equal((packed.values() * packed.alpha).double(), weight.dequantize().double())
        assert torch.allclose(TiledRows((packed, packed)).matmul(x)[:, n:], x @ weight.dequantize().T, atol=1e-5)


def test_groups_keep_their_rows_of_fp8_scales():
    whole = FP8Weight.quantize(torch.randn(512, 256) * torch.logspace(-3, 3, 512).unsqueeze(1))
    for groups in (2, 8, 64):  # 64 groups of 8 rows: tiles would straddle rows of scales
        parts = tiled_groups(whole, groups)
        assert torch.equal(torch.cat([p.values() for p in parts]), whole.dequantize())
        assert {p.format for p in parts} == {"bf16" if groups == 64 else "fp8"}
    odd = FP8Weight(whole.data, torch.rand(4, 2))
    assert not tiled(odd).exact


def test_what_nvfp4_cannot_hold_is_refused():
    codes = torch.full((2, 32), 0x77, dtype=torch.uint8)
    far = MXFP4Weight(codes, torch.tensor([[127, 100], [127, 127]], dtype=torch.uint8))
    with pytest.raises(KernelError, match="more than 17 octaves apart"):
        tiled(far)
    assert tiled(PlainWeight(torch.ones(2, 32))).format == "bf16"
