"""What dsv4 bench counts: bytes of a step and of a call, contexts without a past, recorded ops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4 import load
from dsv4.bench.context import fill_context
from dsv4.bench.kernels import with_copies
from dsv4.bench.record import Call, distinct_experts, recording
from dsv4.bench.roofline import expected_distinct, kv_read_bytes, predicted_bytes, step_bytes, stored_bytes
from dsv4.bench.traffic import moved_bytes, storages
from dsv4.checkpoint.sizes import count, kv_bytes
from dsv4.checkpoint.summary import summarize
from dsv4.checkpoint.synthetic import shortened
from dsv4.config import ModelConfig
from dsv4.errors import RequestError
from dsv4.kernels.linear.linear import linear
from dsv4.kvcache import KVCache
from dsv4.model import Model
from dsv4.quant import kv


@pytest.fixture(scope="module")
def tiny() -> Model:
    return load("random:tiny")


# --------------------------------------------------------------------------------------------------------- bytes


def test_one_row_reads_what_inspect_calls_the_floor() -> None:
    for name, layers in (("random:flash", 8), ("random:pro", None), ("random:tiny", None)):
        config = shortened(ModelConfig.from_name(name), layers)
        stored = stored_bytes(name, "nvfp4", layers)
        sizes = count(config)
        cache = KVCache(config, 1, 64, dtype=torch.bfloat16, device="cpu")
        parts = step_bytes(stored, config, cache, 1, 1, [config.num_experts_per_tok] * len(config.layers))
        floor = sizes.read["nvfp4"]
        # a stored NVFP4 weight brings two scalars (8 bytes) that the plan from a config leaves out
        assert parts.linears + parts.experts == pytest.approx(sum(floor.linears.values()), rel=2e-3)
        assert parts.mhc == floor.mhc and parts.other == pytest.approx(floor.other, rel=1e-3)
        resident = sum(sizes.resident["nvfp4"].values()) - sizes.resident["nvfp4"]["draft"]
        assert sum(nbytes for _, nbytes in stored) == pytest.approx(resident, rel=1e-2)


def test_distinct_experts_grow_to_all_of_them() -> None:
    config = ModelConfig.from_name("random:flash")
    assert expected_distinct(config, 1) == pytest.approx(6)
    draws = torch.rand(4000, 8, 256, generator=torch.Generator().manual_seed(0)).topk(6).indices
    brute = sum(len(set(step.flatten().tolist())) for step in draws) / len(draws)
    assert expected_distinct(config, 8) == pytest.approx(brute, rel=0.005)
    assert 255.9 < expected_distinct(config, 1000) <= 256


@pytest.mark.parametrize("packed", [False, True])
def test_cache_reads_are_counted_with_the_bytes_it_has(packed: bool) -> None:
    config = ModelConfig.from_name("random:flash")
    short = shortened(config, 4)  # two window layers, CSA, HCA
    how = {"pack_entries": packed, "pack_index_keys": packed}
    cache = KVCache(short, 1, 8192, dtype=torch.bfloat16, device="cpu", **how)
    entry, key = (584, 68) if packed else (1024, 256)
    assert kv_read_bytes(short, cache, 8192) == 4 * 128 * entry + 512 * entry + 2048 * key + 64 * entry
    assert kv_read_bytes(short, cache, 100) == 4 * 100 * entry + 25 * entry + 25 * key
    if packed:
        assert kv_read_bytes(short, cache, 8192) == kv_bytes(short, 8192)["read_per_token"]
        assert predicted_bytes([], short, 2, 8192) == 2 * cache_floor(short, 8192)


def cache_floor(config: ModelConfig, tokens: int) -> int:
    """From the shapes of a packed cache for exactly these tokens, without its spare page."""
    cache = KVCache(config, 1, tokens, dtype=torch.bfloat16, device="cpu", pack_entries=True, pack_index_keys=True)
    spare = sum(x[:1].numel() for layer in cache.layers for name, x in vars(layer).items() if name.endswith("pool"))
    return cache.nbytes - spare


def test_the_prediction_is_that_of_inspect() -> None:
    config = shortened(ModelConfig.from_name("random:flash"), 8)
    document = summarize("random:flash", 8)
    cache = document["kv_cache"]["context_tokens"]["131072"]["total_bytes"]
    cache += document["kv_cache"]["state_bytes_per_sequence"]
    weights = document["resident_bytes"]["nvfp4"]["trunk_bytes"]
    assert predicted_bytes(stored_bytes("random:flash", "nvfp4", 8), config, 1, 131072) == weights + cache


# ------------------------------------------------------------------------------------------------------- context


@pytest.mark.parametrize("packed", [False, True])
def test_a_filled_cache_is_finite_valid_and_seeded(tiny: Model, packed: bool) -> None:
    first, again = (tiny.new_cache(2, 400, packed=packed) for _ in range(2))
    assert fill_context(first, 2, 150, room=20, seed=3) == fill_context(again, 2, 150, room=20, seed=3)
    assert [first.length(slot) for slot in (0, 1)] == [150, 150]
    config = tiny.config
    for a, b in zip(first.layers, again.layers, strict=True):
        for name, buffer in vars(a).items():
            assert torch.equal(buffer, getattr(b, name)), name
            values = read_back(name, buffer, config)
            assert torch.isfinite(values).all() and 0.9 < float(values.float().std()) < 1.1, name
    slot = 0
    ids = torch.tensor([5])
    logits = tiny.forward([(slot, ids)], first)
    assert torch.isfinite(logits).all() and first.length(slot) == 151
    for table in first.tables.values():
        assert table.missing(slot, 170) == 0
    with pytest.raises(RequestError, match="length >= 1"):
        fill_context(tiny.new_cache(1, 10), 1, 0, room=0)


def read_back(name: str, buffer: Tensor, config: ModelConfig) -> Tensor:
    if buffer.dtype != torch.uint8:
        return buffer
    if name == "index_pool":
        return kv.unpack_index_key(buffer, config.index_head_dim)
    return kv.unpack_entry(buffer, config.head_dim, config.qk_rope_head_dim)


# -------------------------------------------------------------------------------------------------------- record


def test_calls_are_recorded_where_layers_make_them_and_nothing_stays(tiny: Model) -> None:
    import dsv4.layers.moe as layer

    before = layer.linear
    cache = tiny.new_cache(1, 50)
    slot = cache.acquire()
    with recording(lambda: True) as calls:
        assert layer.linear is not before
        tiny.forward([(slot, torch.arange(10))], cache)
    assert layer.linear is before is linear
    layers = len(tiny.config.layers)
    assert sum(call.op == "moe" for call in calls) == sum(call.op == "ffn_inputs" for call in calls) == layers
    distinct = distinct_experts(calls, layers)
    routed = [call.result[0] for call in calls if call.op == "ffn_inputs"]
    assert distinct == [len(set(ids.flatten().tolist())) for ids in routed]
    assert distinct_experts(calls[:3], layers) is None
    with recording(lambda: True, {"ffn_inputs"}) as only:
        tiny.forward([(slot, torch.tensor([1]))], cache)
    assert {call.op for call in only} == {"ffn_inputs"}
    with recording(lambda: False) as none:
        tiny.forward([(slot, torch.tensor([1]))], cache)
    assert none == []


def test_bytes_of_a_call_are_its_tensors_its_share_of_experts_and_the_rows_it_names(tiny: Model) -> None:
    cache = tiny.new_cache(1, 50)
    slot = cache.acquire()
    tiny.forward([(slot, torch.arange(30))], cache)
    with recording(lambda: True) as calls:
        tiny.forward([(slot, torch.tensor([3]))], cache)
    held, config = storages(cache), tiny.config
    [head] = [call for call in calls if call.op == "linear" and call.args[1] is tiny.vocabulary.operand]
    x = head.args[0]
    assert moved_bytes(head, held) == x.numel() * 2 + tiny.vocabulary.operand.nbytes + config.vocab_size * 4
    moe = next(call for call in calls if call.op == "moe")
    operand = moe.args[1].nbytes * config.num_experts_per_tok / config.n_routed_experts
    rest = sum(t.numel() * t.element_size() for t in (*moe.args, moe.result) if isinstance(t, Tensor))
    assert moved_bytes(moe, held) == pytest.approx(operand + rest, abs=1)
    attention = next(call for call in calls if call.op == "sparse_attention")
    q, ring, rows = attention.args[:3]
    rest = [
        t for t in (q, rows, *attention.args[5:], attention.kwargs["turn"], attention.result) if isinstance(t, Tensor)
    ]
    size = sum(t.numel() * t.element_size() for t in rest)
    assert moved_bytes(attention, held) == size + int((rows >= 0).sum()) * ring.shape[-1] * 2


def test_operands_are_copied_until_they_pass_the_cache_and_no_further(tiny: Model) -> None:
    call = Call("linear", linear, (torch.zeros(1, 96), tiny.blocks[0].ffn.shared_w2), {}, None)
    assert with_copies([call], 10**9, l2=1000) == [call]
    several = with_copies([call], 500, l2=1000)
    assert len(several) == 8 and len({id(one.args[1]) for one in several}) == 8
    assert all(one.args[0] is call.args[0] for one in several)
    bare = Call("rms_norm", linear, (torch.zeros(1, 96),), {}, None)
    assert with_copies([bare], 1, l2=10**6) == [bare]
