"""The cache on the GPU: page tables, packed defaults, memory as predicted, and a plan that a graph replays."""

from dataclasses import replace

import pytest
import torch

import dsv4
from dsv4.checkpoint.sizes import kv_bytes, kv_sizes
from dsv4.config import ModelConfig
from dsv4.kernels.case import Maker
from dsv4.kernels.compress.cases import KINDS, case, decode_rows
from dsv4.kvcache import KVCache, make_plan
from dsv4.layers.step import Rotaries

CUDA = torch.device("cuda")
TINY = ModelConfig.from_name("random:tiny")


def test_the_device_knows_the_pages_after_every_reserve():
    cache = KVCache(TINY, 3, 4000, dtype=torch.bfloat16, device="cuda")
    slots = [cache.acquire() for _ in range(3)]
    for step in range(12):
        cache.reserve([(slot, 90 + 40 * i) for i, slot in enumerate(slots)])
        for i, slot in enumerate(slots):
            cache.advance(slot, 90 + 40 * i)
        for table in cache.tables.values():
            held = table.on_device.cpu()
            assert all(held[slot, : len(table.held[slot])].tolist() == table.held[slot] for slot in slots)
        if step % 4 == 3:
            cache.release(slots[1])
            slots[1] = cache.acquire()


def test_a_model_packs_its_cache_and_it_takes_what_inspect_predicts():
    config = ModelConfig.from_name("random:flash")
    before = torch.cuda.memory_allocated()
    cache = KVCache(config, 1, 65536, dtype=torch.bfloat16, device="cuda", pack_entries=True, pack_index_keys=True)
    parts = kv_bytes(config, 65536)
    predicted = sum(parts[name] for name in ("csa", "index_keys", "hca", "windows")) + kv_sizes(config).states
    assert predicted <= cache.nbytes <= torch.cuda.memory_allocated() - before < 1.05 * predicted
    held = dsv4.load("random:tiny", device="cuda").new_cache(1, 100).layers[1]
    assert held.ring.dtype == held.pool.dtype == held.index_pool.dtype == torch.uint8


@pytest.mark.parametrize("batch", [1, 5])
def test_a_graph_of_the_plan_follows_the_positions(batch):
    cache, rotaries = KVCache(TINY, 3, 4000, dtype=torch.bfloat16, device="cuda"), Rotaries(TINY, "cuda")
    static, step = rotaries.static(cache, batch, 1500)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static.update()
    slots = [cache.acquire() for _ in range(min(batch, 3))]
    for i in range(300):
        cache.reserve([(slot, 1 + 2 * b) for b, slot in enumerate(slots)])
        positions = [cache.length(slot) for slot in slots]
        static.slots.fill_(-1)
        static.slots[: len(slots)] = torch.tensor(slots)
        static.positions[: len(slots)] = torch.tensor(positions)
        graph.replay()
        if i % 7 == 0:
            eager = make_plan([(slot, torch.tensor([7])) for slot in slots], cache)
            width, n = eager.window.rows.shape[1], len(slots)
            assert torch.equal(static.plan.window.rows[:n, :width], eager.window.rows)
            assert torch.equal(static.plan.window.write_to[:n], eager.window.write_to)
            assert (static.plan.window.write_to[n:] == -1).all()
            host = rotaries.step(eager)
            assert (step.token_cis[:, :n] - host.token_cis).abs().max() < 3e-7
            for kind, want in eager.compressed.items():
                got, done = static.plan.compressed[kind], static.plan.compressed[kind].compress.entry_to[:n] >= 0
                assert torch.equal(got.visible[:n], want.visible)
                assert torch.equal(got.compress.write_to[:n], want.compress.write_to)
                assert torch.equal(got.compress.entry_to[:n][done], want.compress.entry_to)
                items = want.compress.items.view(-1, got.compress.items.shape[1])
                assert torch.equal(got.compress.items[:n][done], items)
                assert (got.compress.entry_to[n:] == -1).all() and (got.pages[n:] == -1).all()
        for b, slot in enumerate(slots):
            cache.advance(slot, 1 + 2 * b)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_an_entry_does_not_depend_on_the_batch(kind):
    make = Maker(CUDA)
    positions = [128 * b + 127 for b in range(9)]
    together = case(make, kind, "", "bf16", "packed", decode_rows(kind, positions, 0, False, make))
    u, g, ape, weight, state, pool, rows, cis = together.args
    alone_state, alone_pool = state.clone(), pool.clone()
    together.run(*together.args, **together.kwargs)
    for b in range(9):
        named = ("phase", "write_to", "items", "entry_positions", "entry_to")
        one = {name: getattr(rows, name)[b : b + 1] for name in named}
        single = replace(rows, write_rows=torch.zeros(1, dtype=torch.int64, device=CUDA), **one)
        row = slice(b, b + 1)
        together.run(u[row], g[row], ape, weight, alone_state, alone_pool, single, cis[row], **together.kwargs)
    assert torch.equal(alone_state, state) and torch.equal(alone_pool, pool)
