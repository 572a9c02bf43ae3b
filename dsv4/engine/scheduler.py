"""Who gets a slot, and which prompt tokens go into the next step. First come, first served; nothing is pre-empted."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dsv4.engine.request import Sequence
from dsv4.errors import RequestError
from dsv4.kvcache import KVCache


@dataclass(frozen=True)
class Limits:
    """What an engine may hold at once. All in tokens except max_num_seqs."""

    max_num_seqs: int
    max_model_len: int
    """Prompt and output of one sequence together."""
    max_total_tokens: int
    """Cache entries of all running sequences together."""
    max_num_batched_tokens: int
    """Prompt tokens per step."""
    prefill_chunk: int
    """A prompt's chunks end at multiples of this, whatever else is in the batch."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_model_len", "max_total_tokens", "max_num_batched_tokens", "prefill_chunk"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RequestError(f"{name} must be an integer of at least 1, got {value!r}")


class Chunk(NamedTuple):
    """Prompt tokens start..stop of a sequence."""

    sequence: Sequence
    start: int
    stop: int

    def entry(self) -> tuple[int, Tensor]:
        """(slot, ids [n] i64), as Model.forward takes it."""
        assert self.sequence.slot is not None, "only a sequence that was admitted prefills"
        return self.sequence.slot, self.sequence.request.prompt_tensor[self.start : self.stop]

    @property
    def is_last(self) -> bool:
        return self.stop == len(self.sequence.request.prompt_ids)


class Scheduler:
    """Three queues: waiting, prefilling, decoding. A sequence's whole need is reserved when it is admitted."""

    def __init__(self, limits: Limits, cache: KVCache):
        self.limits, self.cache = limits, cache
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []
        self.decoding: list[Sequence] = []
        self.reserved_tokens = 0

    @property
    def unfinished(self) -> int:
        return len(self.waiting) + len(self.prefilling) + len(self.decoding)

    def check(self, prompt_tokens: int, max_tokens: int | None) -> int:
        """The number of tokens a prompt may generate; RequestError with all counts when it can never be served."""
        limit = min(self.limits.max_model_len, self.limits.max_total_tokens)
        if prompt_tokens < 1:
            raise RequestError("the prompt is empty; give at least one token")
        if prompt_tokens + (max_tokens or 1) > limit:
            wanted = "at least 1" if max_tokens is None else str(max_tokens)
            raise RequestError(
                f"the context holds {limit} tokens, but the prompt has {prompt_tokens} and max_tokens is {wanted} "
                f"({prompt_tokens + (max_tokens or 1)} together); shorten the prompt, lower max_tokens or raise "
                "max_model_len"
            )
        return limit - prompt_tokens if max_tokens is None else max_tokens

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def admit(self) -> None:
        """Give slots to waiting sequences, in order, while slots and reserved tokens last."""
        while self.waiting:
            sequence = self.waiting[0]
            running = len(self.prefilling) + len(self.decoding)
            fits = self.reserved_tokens + sequence.reserved_tokens <= self.limits.max_total_tokens
            if running >= self.limits.max_num_seqs or not fits:
                return
            sequence.slot = self.cache.acquire()
            self.waiting.popleft()
            self.prefilling.append(sequence)
            self.reserved_tokens += sequence.reserved_tokens
            if sequence.request.first_scheduled_time is None:
                sequence.request.first_scheduled_time = time.monotonic()

    def chunks(self) -> list[Chunk]:
        """Prompt chunks of the next step: whole chunks, in order, within max_num_batched_tokens (at least one)."""
        budget = self.limits.max_num_batched_tokens
        chosen: list[Chunk] = []
        for sequence in self.prefilling:
            start, end = sequence.prefilled, len(sequence.request.prompt_ids)
            stop = min(start + self.limits.prefill_chunk, end)
            if chosen and stop - start > budget:
                break
            chosen.append(Chunk(sequence, start, stop))
            budget -= stop - start
        return chosen

    def prefill_done(self, sequence: Sequence) -> None:
        self.prefilling.remove(sequence)
        self.decoding.append(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free its slot."""
        if sequence.slot is None:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
            return
        (self.prefilling if sequence in self.prefilling else self.decoding).remove(sequence)
        self.cache.release(sequence.slot)
        sequence.slot, sequence.next_input = None, None
        self.reserved_tokens -= sequence.reserved_tokens
