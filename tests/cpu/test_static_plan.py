"""Decode on a plan of fixed shapes: the rows of make_plan up to padding, and the same model results."""

import pytest
import torch

import dsv4
from dsv4.config import ModelConfig
from dsv4.errors import CapacityError
from dsv4.kvcache import KVCache, make_plan
from dsv4.layers.step import Rotaries
from dsv4.text.tokenizer import Tokenizer

TINY = ModelConfig.from_name("random:tiny")
NANO = ModelConfig.from_path("dsv4/models/nano")
# Around the starts and ends of windows (24, 128), entries (4, 16, 128) and pages (64 entries: 256, 1024, 8192 tokens).
EDGES = [0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 23, 24, 25, 127, 128, 129, 254, 255, 256, 257, 511, 512, 1022, 1023, 1024]


def put(static, slots, positions, tokens):
    """Fill the first rows; the others are padding with values that must not matter."""
    n = len(slots)
    static.slots[:n], static.slots[n:] = torch.tensor(slots), -1
    static.positions[:n], static.positions[n:] = torch.tensor(positions), 10**6
    static.tokens[:n], static.tokens[n:] = torch.tensor(tokens), 3
    static.update()


def padded(x, width):
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=-1)


def assert_same_rows(static, step, eager, rotaries):
    n, plan, host = len(eager.positions), static.plan, rotaries.step(eager)
    assert torch.equal(plan.positions[:n], eager.positions) and torch.equal(plan.tokens[:n], eager.tokens)
    assert torch.equal(plan.window.rows[:n], padded(eager.window.rows, plan.window.rows.shape[1]))
    assert torch.equal(plan.window.write_to[:n], eager.window.write_to)
    assert torch.equal(step.token_cis[:, :n], host.token_cis) and torch.equal(step.back_cis[:, :n], host.back_cis)
    for kind, want in eager.compressed.items():
        got = plan.compressed[kind]
        assert torch.equal(got.visible[:n], want.visible) and torch.equal(got.sequence[:n], want.sequence)
        for b, count in enumerate((-(-want.visible // 64)).tolist()):
            assert got.pages[b].tolist() == padded(want.pages[b, :count], got.pages.shape[1]).tolist()
        if want.all_rows.shape[1] and got.all_rows.shape[1]:
            assert torch.equal(got.all_rows[:n], padded(want.all_rows, got.all_rows.shape[1]))
        c, w = got.compress, want.compress
        assert torch.equal(c.phase[:n], w.phase) and torch.equal(c.write_to[:n], w.write_to)
        done = c.entry_to[:n] >= 0
        assert torch.equal(c.entry_to[:n][done], w.entry_to)
        assert torch.equal(c.items[:n][done], w.items.view(-1, c.items.shape[1]))
        assert torch.equal(c.entry_positions[:n][done], w.entry_positions)
        assert torch.equal(step.entry_cis[kind][:n][done], host.entry_cis[kind])
        inert = (got.compress.write_to, got.compress.entry_to, got.sequence, *got.pages.T, *got.all_rows.T)
        assert all((row[n:] == -1).all() for row in inert) and (got.visible[n:] == 0).all()
    assert (plan.window.rows[n:] == -1).all() and (plan.window.write_to[n:] == -1).all()


@pytest.mark.parametrize("config", [TINY, NANO], ids=["tiny", "nano"])
@pytest.mark.parametrize("batch", [1, 4])
def test_rows_are_those_of_the_host(config, batch):
    cache, rotaries = KVCache(config, 3, 4000, dtype=torch.float32, device="cpu"), Rotaries(config, "cpu")
    static, step = rotaries.static(cache, batch, 1500)
    slots = [cache.acquire() for _ in range(min(batch, 3))]
    cache.reserve([(slots[0], 300)])  # pages of the sequences interleave
    for i, edge in enumerate(EDGES):
        for b, slot in enumerate(slots):  # each sequence at its own edge; lengths only grow
            cache.reserve([(slot, max(0, EDGES[max(0, i - 3 * b)] - cache.length(slot)))])
            cache.advance(slot, max(0, EDGES[max(0, i - 3 * b)] - cache.length(slot)))
        order = slots if i % 2 else slots[::-1]
        positions = [cache.length(slot) for slot in order]
        assert edge in positions
        eager = make_plan([(slot, torch.tensor([7])) for slot in order], cache)
        put(static, order, positions, [7] * len(order))
        assert_same_rows(static, step, eager, rotaries)


@pytest.mark.parametrize("max_length", [0, 4001])
def test_lengths_beyond_the_cache_are_refused(max_length):
    cache = KVCache(TINY, 3, 4000, dtype=torch.float32, device="cpu")
    with pytest.raises(CapacityError, match=rf"max_length of 1\.\.4000 .* max_length {max_length}"):
        Rotaries(TINY, "cpu").static(cache, 1, max_length)


def poison(cache, slot):
    """NaN in all that a slot holds, but 255 where bytes are held: an E8M0 scale of it is NaN."""
    for layer in cache.layers:
        for name in ("ring", "state", "index_state"):
            if hasattr(layer, name):
                buffer = getattr(layer, name)[slot]
                buffer.fill_(255 if buffer.dtype == torch.uint8 else float("nan"))


def contents(cache, slot):
    names = ("ring", "state", "index_state")
    return [getattr(layer, name)[slot].clone() for layer in cache.layers for name in names if hasattr(layer, name)]


def decoded(model, prompts, steps, batch, max_length, packed):
    """Logits of `steps` decode steps of several prompts, eager and on a static plan, fed the same tokens."""
    caches = [model.new_cache(len(prompts) + 1, 2000, packed=packed) for _ in range(2)]
    unused = [cache.acquire() for cache in caches]
    for cache, slot in zip(caches, unused, strict=True):
        poison(cache, slot)
    before = contents(caches[1], unused[1])
    slots = [caches[0].acquire() for _ in prompts]
    assert slots == [caches[1].acquire() for _ in prompts]
    for cache in caches:
        for slot, prompt in zip(slots, prompts, strict=True):
            logits = model.forward([(slot, prompt)], cache)
    static, step = model.rotaries.static(caches[1], batch, max_length)
    tokens, eager, replayed = [int(logits.argmax())] * len(slots), [], []
    for _ in range(steps):
        eager.append(model.forward([(s, torch.tensor([t])) for s, t in zip(slots, tokens, strict=True)], caches[0]))
        caches[1].reserve([(slot, 1) for slot in slots])
        put(static, slots, [caches[1].length(slot) for slot in slots], tokens)
        with torch.inference_mode():
            replayed.append(model.head(model.body(step, caches[1]))[: len(slots)])
        for slot in slots:
            caches[1].advance(slot, 1)
        tokens = eager[-1].argmax(-1).tolist()
    after = contents(caches[1], unused[1])
    assert all(a.view(torch.uint8).equal(b.view(torch.uint8)) for a, b in zip(before, after, strict=True))
    return torch.stack(eager), torch.stack(replayed)


def random_ids(count, vocab, seed):
    return torch.randint(5, vocab, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("max_length", [64, 1000])
def test_tiny_decodes_the_same_in_float32(max_length):
    """Prompts of 1, 13 and 20 tokens, then 40 steps: over the window (24), many entries of 4 and 16, the top 5."""
    model = dsv4.load("random:tiny", dtype="float32", kv_quant=False, index_quant=False)
    prompts = [random_ids(n, 331, n) for n in (1, 13, 20)]
    eager, static = decoded(model, prompts, 40, 5, max_length, False)
    assert (eager - static).abs().max() < 2e-5 * eager.abs().max()


def test_nano_decodes_the_same_in_float32():
    """Over an entry of 128 and the window's edge, a CSA page (256 tokens), and the top 64."""
    model = dsv4.load("nano", dtype="float32", kv_quant=False, index_quant=False)
    prompts = [random_ids(n, 4096, n) for n in (120, 252)]
    eager, static = decoded(model, prompts, 12, 4, 1000, False)
    assert (eager - static).abs().max() < 2e-5 * eager.abs().max()


def test_nano_writes_the_same_text_in_bfloat16_packed_or_not():
    """Widths and batch differ from the eager step, and so the order of float32 sums; packing changes no bit."""
    model = dsv4.load("nano")
    ids = torch.tensor(Tokenizer.from_folder(model.path).encode((model.path / "eval" / "english.txt").read_text()))
    prompts = [ids[:120], ids[1000:1252]]
    eager, static = decoded(model, prompts, 12, 4, 1000, False)
    assert torch.equal(eager.argmax(-1), static.argmax(-1))
    assert (eager - static).abs().max() < 0.02 * eager.abs().max()
    eager_packed, static_packed = decoded(model, prompts, 12, 4, 1000, True)
    assert torch.equal(eager, eager_packed) and torch.equal(static, static_packed)
