"""`dsv4 bench prefill`: how long a prompt takes, chunk by chunk, on the same model call that serves it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from dsv4.bench.prompt import bars, made_by, read, table, time_calls
from dsv4.bench.report import Row, Run, rate, speed
from dsv4.bench.roofline import Stored, expected_distinct, step_bytes
from dsv4.bench.timing import Timer
from dsv4.bench.waterfall_plot import picture
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
    waterfall: bool = False,
    seed: int = 0,
) -> Iterator[Row]:
    """A row per prompt length: the median of `repeats` prefills of random tokens into an empty cache, host included.

    bytes: weights once per chunk, with the experts that many rows are expected to touch; what attention reads is left
    out. So gb_s and share say how far weights bound it; `tokens_per_s` in `more` is what it is for. Beside it: `flop`
    of the linears and experts (2 x rows x weights) as one more prefill calls them, `tflop_s` of the whole time, and
    `dense_share` of what a dense BF16 product reaches in the same run (`dense_tflop_s`). With several ranks, of one.
    waterfall: also where one more prompt went, as a table (`waterfall` in `more`) and the picture of its layers.
    """
    config, dense = model.config, timer.dense_tflop_s()
    for length in contexts:
        timer.reset_peak()
        cache = model.new_cache(1, length)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, config.vocab_size, (length,), generator=generator)
        prompt = partial(read, model, cache, ids, chunk)
        made = made_by(prompt, cache)
        flop = sum(call.flop for call in made)
        times = timer.times(prompt, repeats=repeats, warmup=warmup)
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
        more: dict[str, Any] = {
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
        drawn = None
        if waterfall:
            timed, whole = time_calls(prompt, timer)
            more["waterfall"] = table(made, timed, whole, len(config.layers), run.copy_gb_s, dense)
            drawn = picture(bars(made, timed), config, run, f"a prompt of {length:,} tokens")
        yield Row(run, values, more, drawn)
