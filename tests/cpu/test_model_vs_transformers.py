"""The model in float32, trained-in quantisation off, against transformers' deepseek_v4 on random small models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import hf
from oracle.rounding import Rounder
from oracle.walkthrough import Walkthrough
from torch import Tensor

import dsv4
from dsv4.testing.tolerance import FLOAT32_LOGITS, deviation


@dataclass(frozen=True)
class Pair:
    """One random model in both libraries, a prompt, and transformers' logits [T, V] for it."""

    case: hf.Case
    folder: Path
    theirs: Any
    ours: Any
    ids: Tensor
    expected: Tensor


@pytest.fixture(scope="module", params=hf.CASES, ids=lambda case: case.name)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    case = request.param
    folder = tmp_path_factory.mktemp(case.name)
    theirs = hf.build(case, folder)
    ours = dsv4.load(folder, dtype="float32", act="bf16", kv_quant=False, index_quant=False)
    ids = hf.prompt(case)
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
    return Pair(case, folder, theirs, ours, ids, expected)


def run(model: Any, slot: int, parts: list[Tensor], cache: Any) -> Tensor:
    """Logits of all rows of a sequence fed part by part."""
    return torch.cat([model.forward([(slot, part)], cache, all_logits=True) for part in parts])


def random_parts(ids: Tensor, seed: int) -> list[Tensor]:
    """Cut a prompt at random, with the lengths that lie around a window, an entry and a page mixed in."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([1, 1, 2, 3, 4, 5, 16, 63, 64, 127, 128, 129])
    parts = []
    while len(ids):
        n = int(lengths[torch.randint(len(lengths), (), generator=generator)])
        parts.append(ids[:n])
        ids = ids[n:]
    return parts


def test_one_shot_logits_agree(pair: Pair) -> None:
    assert deviation(pair.ours.logits(pair.ids), pair.expected) < FLOAT32_LOGITS.limit


def walked(pair: Pair, ids: Tensor) -> Any:
    """The walk-through's logits; no choice among experts or entries may be so close that float32 noise decides it."""
    rounder = Rounder(measure=True)
    logits = Walkthrough(pair.folder, rounder=rounder).logits(ids.numpy())
    assert all(margin.smallest > 1e-5 for margin in rounder.margins.values()), rounder.report()
    return logits


def test_the_oracles_agree_with_each_other(pair: Pair) -> None:
    assert deviation(pair.expected, walked(pair, pair.ids)) < FLOAT32_LOGITS.limit


@pytest.mark.parametrize("chunk", [1, 3, 127, 128, 129])
def test_chunked_prefill_agrees(pair: Pair, chunk: int) -> None:
    assert deviation(pair.ours.logits(pair.ids, chunk=chunk), pair.expected) < FLOAT32_LOGITS.limit


def test_random_chunks_and_decode_agree(pair: Pair) -> None:
    for seed in range(3):
        cache = pair.ours.new_cache(1, len(pair.ids))
        logits = run(pair.ours, cache.acquire(), random_parts(pair.ids, seed), cache)
        assert deviation(logits, pair.expected) < FLOAT32_LOGITS.limit, seed
    half = len(pair.ids) // 2
    assert deviation(pair.ours.logits(pair.ids, prefill=half), pair.expected) < FLOAT32_LOGITS.limit


def test_batches_of_different_lengths_agree(pair: Pair) -> None:
    """Four sequences advance together by different chunks, then decode together; each row as if it were alone."""
    generator = torch.Generator().manual_seed(4)
    ids = [torch.randint(0, 199, (n,), generator=generator) for n in (1, 40, 139, 14)]
    expected = [walked(pair, row) for row in ids]
    cache = pair.ours.new_cache(len(ids), sum(map(len, ids)))
    slots = [cache.acquire() for _ in ids]
    found: list[list[Tensor]] = [[] for _ in ids]
    done = [0] * len(ids)
    while any(d < len(row) for d, row in zip(done, ids, strict=True)):
        # prompts are fed in unequal chunks; the last 8 tokens of every sequence one by one
        batch, rows = [], []
        for i, row in enumerate(ids):
            left = len(row) - done[i]
            if left:
                n = min(left - 8, 17 + 30 * i) if left > 8 else 1
                batch.append((slots[i], row[done[i] : done[i] + n]))
                rows.append((i, n))
        logits = pair.ours.forward(batch, cache, all_logits=True)
        for (i, n), part in zip(rows, logits.split([n for _, n in rows]), strict=True):
            found[i].append(part)
            done[i] += n
    for i, rows_found in enumerate(found):
        assert deviation(torch.cat(rows_found), expected[i]) < FLOAT32_LOGITS.limit, f"sequence {i}"


def test_last_rows_and_reused_slots_agree(pair: Pair) -> None:
    """Without all_logits only last rows come back; a released slot starts from nothing."""
    cache = pair.ours.new_cache(1, len(pair.ids))
    slot = cache.acquire()
    run(pair.ours, slot, [pair.ids.flip(0)], cache)
    cache.release(slot)
    slot = cache.acquire()
    last = pair.ours.forward([(slot, pair.ids)], cache)
    assert last.shape == (1, pair.expected.shape[1])
    assert deviation(last[0], pair.expected[-1]) < FLOAT32_LOGITS.limit
    assert cache.length(slot) == len(pair.ids)


GREEDY = [case for case in hf.CASES if case.name in ("WCHC-97", "HCWC-131-yarn", "W-1")]


@pytest.mark.parametrize("case", GREEDY, ids=lambda case: case.name)
def test_two_hundred_greedy_tokens_agree(case: hf.Case, tmp_path: Path) -> None:
    theirs = hf.build(case, tmp_path)
    ours = dsv4.load(tmp_path, dtype="float32", act="bf16", kv_quant=False, index_quant=False)
    ids = hf.prompt(case)
    with torch.no_grad():
        expected = theirs.generate(ids[None], do_sample=False, max_new_tokens=200, min_new_tokens=200)[0, len(ids) :]
    assert len(expected) == 200
    cache = ours.new_cache(1, len(ids) + 200)
    slot = cache.acquire()
    tokens: list[int] = []
    step = ids
    while len(tokens) < 200:
        tokens.append(int(ours.forward([(slot, step)], cache)[0].argmax()))
        step = torch.tensor(tokens[-1:])
    assert tokens == expected.tolist()
