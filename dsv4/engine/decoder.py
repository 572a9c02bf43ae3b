"""Decode steps of whatever batch is running: DecodeSteps per batch bucket, captured before the first request."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.engine.request import Sequence
from dsv4.engine.sampler import SamplerBuffers
from dsv4.engine.scheduler import Limits
from dsv4.engine.step import FASTER_AT_ONCE, DecodeStep
from dsv4.kvcache import KVCache
from dsv4.model import Model

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
#: Tokens up to which all layers in one launch do without what only longer sequences need: 8192 entries of four tokens
#: to select from, and 512 of 128 tokens beside the window. The same bits, sooner (docs/measured.md).
SHORT = 32768


def buckets(most: int) -> list[int]:
    """Batch sizes to make steps for, so that up to `most` sequences fit: each at most twice the one before."""
    sizes = [n for n in BUCKETS if n < most]
    while not sizes or sizes[-1] < most:
        sizes.append(BUCKETS[len(sizes)] if len(sizes) < len(BUCKETS) else 2 * sizes[-1])
    return sizes


class Decoder:
    """Runs the decode steps of an engine on static buffers; on a GPU each is one launch of a graph. Few sequences that
    are all short have steps of their own.

    As long as the batch stays the same nothing is sent to the device: tokens, positions and counters move on there.
    """

    def __init__(self, model: Model, cache: KVCache, limits: Limits):
        self.cache = cache
        sizes = buckets(limits.max_num_seqs)
        self._sampler = SamplerBuffers(sizes[-1], model.config.vocab_size, model.device)
        longest = min(limits.max_model_len, cache.max_tokens)
        pool = torch.cuda.graph_pool_handle() if self._sampler.device.type == "cuda" else None
        self._steps: list[DecodeStep] = []
        for rows in reversed(sizes):  # the largest first: the others' graphs reuse its memory
            lengths = {longest, min(longest, SHORT)} if rows <= FASTER_AT_ONCE else {longest}
            for most in sorted(lengths, reverse=True):
                step = DecodeStep(model, cache, rows, max_length=most, sampler=self._sampler, pool=pool)
                if pool is not None:
                    step.capture()
                self._steps.insert(0, step)
        self._staged: tuple[DecodeStep, list[Sequence]] | None = None

    def __call__(self, sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
        """One token more for each: its ids [B] i64 on the CPU, -1 where logits are not finite, and logits [B, V]."""
        grown = 1 + max(self.cache.length(s.slot) for s in sequences if s.slot is not None)
        step = next(s for s in self._steps if s.rows >= len(sequences) and s.static.max_length >= grown)
        if self._staged is None or self._staged[0] is not step or self._staged[1] != sequences:
            self._stage(step, sequences)
        step.run()
        for sequence in sequences:
            assert sequence.slot is not None
            self.cache.advance(sequence.slot, 1)
        tokens = torch.tensor(step.wait()[: len(sequences)])
        return tokens, step.logits[: len(sequences)]

    def _stage(self, step: DecodeStep, sequences: list[Sequence]) -> None:
        """Pages for all that the sequences may still say are taken here, so that none is missing between two steps."""
        slots = [s.slot for s in sequences if s.slot is not None]
        needs = zip(slots, sequences, strict=True)
        self.cache.reserve([(slot, s.reserved_tokens - self.cache.length(slot)) for slot, s in needs])
        for row, sequence in enumerate(sequences):
            self._sampler.take(row, sequence)
        for row in range(len(sequences), step.rows):
            self._sampler.clear(row)
        step.stage(slots, [s.token_ids[-1] for s in sequences])
        self._staged = step, list(sequences)
