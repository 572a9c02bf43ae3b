"""A model with the interface of dsv4's and no layers, and an engine around it, for tests of what stands above."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dsv4.engine.engine import Engine
from dsv4.engine.output import RequestOutput
from dsv4.engine.params import SamplingParams
from dsv4.engine.scheduler import Limits
from dsv4.errors import CapacityError

EOS = 1
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


class FakeCache:
    """Histories instead of keys and values; strict about slots and room."""

    def __init__(self, max_seqs: int, max_tokens: int):
        self.max_seqs, self.max_tokens = max_seqs, max_tokens
        self.histories: dict[int, list[int]] = {}

    @property
    def free_slots(self) -> int:
        return self.max_seqs - len(self.histories)

    def acquire(self) -> int:
        if not self.free_slots:
            raise CapacityError("no slot")
        slot = min(set(range(self.max_seqs)) - self.histories.keys())
        self.histories[slot] = []
        return slot

    def release(self, slot: int) -> None:
        del self.histories[slot]

    def length(self, slot: int) -> int:
        return len(self.histories[slot])


class FakeModel:
    """Logits are a pseudo-random function of the whole history, so that any mix-up of sequences changes the output.

    `script` maps a prompt to the tokens that a greedy request continues with; `poison` maps history lengths to a value
    one of their logits takes; `batches` records (sequences, tokens) of every call.
    """

    path = None
    device = "cpu"

    def __init__(self, vocab_size: int = 50, script: dict[tuple[int, ...], Sequence[int]] | None = None):
        self.config = SimpleNamespace(
            vocab_size=vocab_size, max_position_embeddings=256, eos_token_id=1, bos_token_id=0
        )
        self.script = script or {}
        self.poison: dict[int, float] = {}
        self.fail_at: int | None = None
        self.batches: list[tuple[int, int]] = []
        self.caches: list[FakeCache] = []

    def new_cache(self, max_seqs: int, max_tokens: int) -> FakeCache:
        self.caches.append(FakeCache(max_seqs, max_tokens))
        return self.caches[-1]

    def row(self, history: Sequence[int]) -> Tensor:
        digest = hashlib.sha256(repr(list(history)).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        logits = torch.randn(self.config.vocab_size, generator=generator) * 2
        for prompt, following in self.script.items():
            done = len(history) - len(prompt)
            if tuple(history[: len(prompt)]) == prompt and 0 <= done < len(following):
                logits[following[done]] = 30.0
        if len(history) in self.poison:
            logits[3] = self.poison[len(history)]
        return logits

    def forward(self, batch: Sequence[tuple[int, Tensor]], cache: FakeCache, *, all_logits: bool = False) -> Tensor:
        if self.fail_at is not None and len(self.batches) >= self.fail_at:
            raise RuntimeError("the model broke")
        assert len({slot for slot, _ in batch}) == len(batch)
        self.batches.append((len(batch), sum(len(ids) for _, ids in batch)))
        rows = []
        for slot, ids in batch:
            history = cache.histories[slot]
            for i, token in enumerate(ids.tolist()):
                history.append(token)
                if all_logits or i == len(ids) - 1:
                    rows.append(self.row(history))
        if sum(map(len, cache.histories.values())) > cache.max_tokens:
            raise CapacityError("more tokens than the cache holds")
        return torch.stack(rows)

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """What a greedy request must generate, by the simplest loop there is."""
        history = list(prompt)
        for _ in range(count):
            history.append(int(self.row(history).argmax()))
        return history[len(prompt) :]


def engine(model: Any = None, *, seed: int = 0, eos: tuple[int, ...] = (EOS,), **limits: int) -> Engine:
    sizes = {
        "max_num_seqs": 4,
        "max_model_len": 100,
        "max_total_tokens": 400,
        "max_num_batched_tokens": 64,
        "prefill_chunk": 16,
    }
    return Engine(model or FakeModel(), Limits(**{**sizes, **limits}), eos_ids=eos, seed=seed)


def run(e: Engine, *jobs: tuple[list[int], SamplingParams]) -> list[RequestOutput]:
    requests = [e.add(ids, params) for ids, params in jobs]
    while e.busy:
        e.step()
    assert_nothing_is_held(e)
    return [r.output() for r in requests]


def assert_nothing_is_held(e: Engine) -> None:
    assert e.cache.free_slots == e.limits.max_num_seqs
    assert e.scheduler.reserved_tokens == 0 and not e.requests and not e.busy


def prompts(count: int, longest: int = 60) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(2, 50) for _ in range(rng.randint(1, longest))] for _ in range(count)]
