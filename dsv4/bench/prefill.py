"""`dsv4 bench prefill`: how long a prompt takes, chunk by chunk, on the same model call that serves it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from dsv4.bench.flop import GEMMS, flop_of
from dsv4.bench.record import Call, recording
from dsv4.bench.report import Row, Run, rate, speed
from dsv4.bench.roofline import Stored, expected_distinct, step_bytes
from dsv4.bench.timing import Timer
from dsv4.kvcache import KVCache
from dsv4.model import Model


def bench_prefill(
    model: Model,
    stored: Stored,
    run: Run,
    timer: Timer,
    *,
    contexts: Sequence[int],
    chunk: int,
    repeats: int = 5,
    warmup: int = 1,
    seed: int = 0,
) -> Iterator[Row]:
    """A row per prompt length: the median of `repeats` prefills of random tokens into an empty cache, host included.

    bytes: weights once per chunk, with the experts that many rows are expected to touch; what attention reads is left
    out. So gb_s and share say how far weights bound it; `tokens_per_s` in `more` is what it is for. Beside it: `flop`
    of the linears and experts (2 x rows x weights) as one more prefill calls them, `tflop_s` of the whole time, and
    `dense_share` of what a dense BF16 product reaches in the same run (`dense_tflop_s`). With several ranks, of one.
    """
    config, dense = model.config, timer.dense_tflop_s()
    for length in contexts:
        timer.reset_peak()
        cache = model.new_cache(1, length)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, config.vocab_size, (length,), generator=generator)
        flop = prefill_flop(model, cache, ids, chunk)
        times = timer.times(partial(read, model, cache, ids, chunk), repeats=repeats, warmup=warmup)
        us = statistics.median(times)
        nbytes = 0
        for part in ids.split(chunk):
            distinct = [expected_distinct(config, len(part))] * len(config.layers)
            parts = step_bytes(stored, config, cache, len(part), 0, distinct)
            nbytes += parts.total
        values = {
            "batch": 1,
            "context": length,
            "us_per_step": round(us, 2),
            "bytes": nbytes,
            **speed(nbytes, us, run.copy_gb_s),
            "kernels": None,
        }
        more = {
            "tokens_per_s": round(length / us * 1e6, 1),
            "flop": flop,
            **rate(flop, us, dense),
            "dense_tflop_s": round(dense, 1),
            "us_per_layer": round(us / len(config.layers), 3),
            "chunk": min(chunk, length),
            "repeats": repeats,
            "us_min": round(min(times), 2),
            "us_max": round(max(times), 2),
            "peak_bytes": timer.peak_bytes(),
        }
        yield Row(run, values, more)


def prefill_flop(model: Model, cache: KVCache, ids: Tensor, chunk: int) -> int:
    """What `read` multiplies and adds with weights."""
    total = 0

    def count(call: Call) -> None:
        nonlocal total
        total += flop_of(call)

    with recording(lambda: True, GEMMS, keep=count):
        read(model, cache, ids, chunk)
    return total


def read(model: Model, cache: KVCache, ids: Tensor, chunk: int) -> None:
    """Append ids [T] i64 to a new sequence, in chunks, and drop it."""
    slot = cache.acquire()
    try:
        for part in ids.split(chunk):
            model.forward([(slot, part)], cache)
    finally:
        cache.release(slot)
