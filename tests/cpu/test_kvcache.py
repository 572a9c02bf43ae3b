"""The cache: slots, pages and capacity on the host; which rows a step reads and writes, against a slow simulation."""

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4.config import ModelConfig
from dsv4.errors import CapacityError, RequestError
from dsv4.kvcache import KVCache, make_plan
from dsv4.kvcache.layout import PAGE_ENTRIES, entries, pages

CONFIG = ModelConfig.from_name("random:tiny")


def new_cache(max_seqs: int = 3, max_tokens: int = 900) -> KVCache:
    return KVCache(CONFIG, max_seqs, max_tokens, dtype=torch.float32, device="cpu")


def append(cache: KVCache, slot: int, count: int) -> None:
    cache.reserve([(slot, count)])
    cache.advance(slot, count)


def test_entries_and_pages_at_their_edges():
    assert [entries(t, 4) for t in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
    assert [pages(t, 4) for t in (3, 4, 4 * PAGE_ENTRIES, 4 * PAGE_ENTRIES + 3, 4 * PAGE_ENTRIES + 4)] == [
        0,
        1,
        1,
        1,
        2,
    ]


def test_slots_run_out_with_both_numbers():
    cache = new_cache(max_seqs=2)
    a, b = cache.acquire(), cache.acquire()
    assert a != b and cache.free_slots == 0
    with pytest.raises(CapacityError, match="all 2 sequence slots are in use"):
        cache.acquire()
    cache.release(a)
    assert cache.acquire() == a


def test_tokens_run_out_and_nothing_is_taken():
    cache = new_cache(max_seqs=2, max_tokens=100)
    a, b = cache.acquire(), cache.acquire()
    append(cache, a, 90)
    free = {kind: list(table.free) for kind, table in cache.tables.items()}
    with pytest.raises(CapacityError, match="11 tokens do not fit: the cache holds max_tokens = 100 and 90 are in use"):
        cache.reserve([(b, 11)])
    assert {kind: table.free for kind, table in cache.tables.items()} == free
    with pytest.raises(CapacityError, match="12 tokens do not fit"):  # together, though each would fit alone
        cache.reserve([(a, 6), (b, 6)])
    append(cache, b, 10)
    assert cache.free_tokens == 0


def test_a_sequence_longer_than_the_model_is_refused():
    cache = new_cache(max_seqs=1, max_tokens=10**4)
    slot = cache.acquire()
    with pytest.raises(CapacityError, match=r"4097 tokens \(slot 0\) exceeds max_position_embeddings = 4096"):
        cache.reserve([(slot, 4097)])


def test_any_split_of_the_tokens_fits():
    # Pages are rounded up per sequence: the pool must hold the worst split of max_tokens over max_seqs.
    cache = new_cache(max_seqs=3, max_tokens=900)
    for lengths in ([900], [1, 1, 898], [260, 260, 380], [4, 4, 4]):
        slots = [cache.acquire() for _ in lengths]
        for slot, length in zip(slots, lengths, strict=True):
            append(cache, slot, length)
        for slot in slots:
            cache.release(slot)
    assert cache.free_slots == 3 and cache.free_tokens == 900


def test_pages_of_two_sequences_are_disjoint_and_come_back():
    cache = new_cache()
    a, b = cache.acquire(), cache.acquire()
    for _ in range(10):
        append(cache, a, 30)
        append(cache, b, 29)
    for table in cache.tables.values():
        rows = [table.rows(slot, 0, entries(cache.length(slot), table.ratio)) for slot in (a, b)]
        assert len(set(torch.cat(rows).tolist())) == sum(map(len, rows))
        total = len(table.free) + sum(map(len, table.held))
        cache_free = sorted([*table.free, *(page for held in table.held for page in held)])
        assert cache_free == list(range(total))


@pytest.mark.parametrize("slot", [-1, 0, 3])
def test_a_slot_without_a_sequence_is_refused(slot):
    with pytest.raises(CapacityError, match=f"slot {slot} holds no sequence"):
        new_cache().length(slot)


def test_a_cache_of_nothing_is_refused():
    with pytest.raises(CapacityError, match="got 0 and 5"):
        new_cache(max_seqs=0, max_tokens=5)


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_a_step_refuses_what_it_cannot_run():
    cache = new_cache()
    slot = cache.acquire()
    for batch, message in [
        ([], "takes each sequence once, at least one"),
        ([(slot, ids(1)), (slot, ids(2))], "takes each sequence once"),
        ([(slot, ids())], "non-empty 1-d tensor"),
        ([(slot, ids(1).unsqueeze(0))], "non-empty 1-d tensor"),
        ([(slot, ids(331))], r"token id 331 is outside the vocabulary 0..330"),
        ([(slot, ids(5, -1))], r"token id -1 is outside"),
    ]:
        with pytest.raises(RequestError, match=message):
            make_plan(batch, cache)
    assert cache.length(slot) == 0


@pytest.mark.parametrize("chunks", [[[1, 1, 1]] * 60, [[50, 3, 1], [1, 100, 24], [30, 1, 1], [1, 1, 1]]])
def test_every_row_means_the_position_it_should(chunks):
    """Simulate ring, state and pool holding (sequence, position) and check what each row number points at."""
    cache = new_cache(max_seqs=3, max_tokens=600)
    slots = [cache.acquire() for _ in range(3)]
    window = CONFIG.sliding_window
    ring: dict[int, tuple[int, int]] = {}
    state: dict[tuple, dict[int, tuple[int, int]]] = {kind: {} for kind in cache.tables}
    pool: dict[tuple, dict[int, tuple[int, int]]] = {kind: {} for kind in cache.tables}
    for lengths in chunks:
        plan = make_plan([(s, torch.zeros(n, dtype=torch.int64)) for s, n in zip(slots, lengths, strict=True)], cache)
        tokens = [(s.slot, p) for s in plan.segments for p in range(s.start, s.end)]
        local = [ring[r] for r in plan.window.history.tolist()] + tokens
        for row, to in zip(plan.window.write_rows.tolist(), plan.window.write_to.tolist(), strict=True):
            ring[to] = tokens[row]
        for t, (slot, p) in enumerate(tokens):
            seen = [(ring[r] if plan.window.in_ring else local[r]) for r in plan.window.rows[t].tolist() if r >= 0]
            assert seen == [(slot, q) for q in range(max(0, p - window + 1), p + 1)]
        for kind, rows in plan.compressed.items():
            overlap, ratio, c = kind[0] == "csa", kind[1], rows.compress
            assert c.phase.tolist() == [p % ratio for _, p in tokens]
            source = [] if c.from_state else [state[kind][r] for r in c.history.tolist()] + tokens
            for row, to in zip(c.write_rows.tolist(), c.write_to.tolist(), strict=True):
                state[kind][to] = tokens[row]
            done = [(s.slot, i) for s in plan.segments for i in range(s.start // ratio, s.end // ratio)]
            assert c.entry_positions.tolist() == [i * ratio for _, i in done]
            for (slot, i), items, to in zip(done, c.items.tolist(), c.entry_to.tolist(), strict=True):
                found = [(state[kind][r] if c.from_state else source[r]) if r >= 0 else None for r in items]
                first = ratio * (i - 1) if overlap else ratio * i
                assert found == [(slot, q) if q >= 0 else None for q in range(first, ratio * (i + 1))]
                pool[kind][to] = (slot, i)
            for b, segment in enumerate(plan.segments):
                seen = [rows.pages[b, i // PAGE_ENTRIES] * PAGE_ENTRIES + i % PAGE_ENTRIES
                        for i in range(segment.end // ratio)]  # fmt: skip
                assert [pool[kind][int(r)] for r in seen] == [(segment.slot, i) for i in range(segment.end // ratio)]
            for t, (slot, p) in enumerate(tokens):
                assert plan.segments[int(rows.sequence[t])].slot == slot
                if rows.all_rows.shape[1]:
                    seen = [pool[kind][r] for r in rows.all_rows[t].tolist() if r >= 0]
                    assert seen == [(slot, i) for i in range((p + 1) // ratio)]
            assert rows.visible.tolist() == [(p + 1) // ratio for _, p in tokens]
        for s in plan.segments:
            cache.advance(s.slot, s.length)


class Largest(TorchDispatchMode):
    """The most elements that a tensor has which is made on the host."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor) and x.device.type == "cpu"]
        self.elements = max(self.elements, *(x.numel() for x in made), 0)
        return result


@pytest.mark.parametrize("lengths", [[700], [300, 1, 400]])
def test_what_each_token_sees_is_made_on_the_device_of_the_cache(lengths):
    """On `meta`, where a tensor of the host among others is an error: the host makes a few numbers a token."""
    cache = new_cache(max_seqs=3, max_tokens=2100)
    batch = [(cache.acquire(), torch.zeros(n, dtype=torch.int64)) for n in lengths]
    cache.device = "meta"
    with Largest() as host:
        plan = make_plan(batch, cache)
    total = sum(lengths)
    assert plan.window.rows.device.type == "meta" and plan.window.rows.shape == (total, CONFIG.sliding_window)
    widths = [rows.all_rows.shape[1] for rows in plan.compressed.values()]
    assert all(rows.all_rows.device.type == "meta" for rows in plan.compressed.values())
    assert 0 < host.elements <= 4 * total < total * max(CONFIG.sliding_window, *widths)
