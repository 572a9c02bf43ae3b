"""A cache of packed bytes: the model's results keep every bit, and it takes the memory that inspect predicts."""

import pytest
import torch

import dsv4
from dsv4.checkpoint.sizes import kv_bytes, kv_sizes
from dsv4.config import ModelConfig
from dsv4.errors import ConfigError
from dsv4.kvcache import KVCache


def run(model, ids, packed):
    """Logits of two sequences of unequal length: chunks, then decode together."""
    cache = model.new_cache(2, 2 * len(ids), packed=packed)
    a, b = cache.acquire(), cache.acquire()
    logits = [model.forward([(a, ids[:30])], cache, all_logits=True)]
    logits.append(model.forward([(a, ids[30:100]), (b, ids[:50])], cache, all_logits=True))
    for t in range(100, len(ids)):
        logits.append(model.forward([(a, ids[t : t + 1]), (b, ids[t - 50 : t - 49])], cache, all_logits=True))
    return torch.cat(logits), cache


@pytest.mark.parametrize("index_quant", [True, False])
@pytest.mark.parametrize("name", ["random:tiny", "nano"])
def test_the_model_gives_the_same_bits(name, index_quant):
    model = dsv4.load(name, index_quant=index_quant)
    ids = torch.randint(5, 331, (140,), generator=torch.Generator().manual_seed(1))
    plain, values = run(model, ids, None)
    packed, held = run(model, ids, True)
    assert torch.equal(plain, packed)
    assert values.layers[1].ring.dtype == torch.bfloat16  # the default of a CPU
    for buffer, is_packed in [("ring", True), ("pool", True), ("index_pool", index_quant)]:
        assert getattr(held.layers[1], buffer).dtype == (torch.uint8 if is_packed else torch.bfloat16)


def test_what_is_not_rounded_is_not_packed():
    cache = dsv4.load("random:tiny", kv_quant=False).new_cache(1, 10, packed=True)
    assert cache.layers[1].ring.dtype == cache.layers[1].pool.dtype == torch.bfloat16
    assert cache.layers[1].index_pool.dtype == torch.uint8


def test_float32_values_have_no_packed_form():
    with pytest.raises(ConfigError, match=r"holds bfloat16 values; torch\.float32 needs a cache that is not packed"):
        dsv4.load("random:tiny", dtype="float32").new_cache(1, 10, packed=True)


@pytest.mark.parametrize("name", ["random:flash", "random:pro"])
@pytest.mark.parametrize("tokens", [65536, 1048576])
def test_memory_is_what_inspect_predicts(name, tokens):
    config = ModelConfig.from_name(name)
    cache = KVCache(config, 1, tokens, dtype=torch.bfloat16, device="meta", pack_entries=True, pack_index_keys=True)
    parts = kv_bytes(config, tokens)
    predicted = sum(parts[name] for name in ("csa", "index_keys", "hca", "windows")) + kv_sizes(config).states
    assert predicted <= cache.nbytes < 1.01 * predicted  # one page per slot and layer more than the tokens fill
