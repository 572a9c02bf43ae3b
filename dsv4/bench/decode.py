"""`dsv4 bench decode`: one decode step as one replay of a CUDA graph, at given batches and contexts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch

from dsv4.bench.context import fill_context
from dsv4.bench.phases import Clock
from dsv4.bench.record import distinct_experts, recording
from dsv4.bench.report import Row, Run, speed
from dsv4.bench.roofline import Stored, expected_distinct, predicted_bytes, step_bytes
from dsv4.bench.timing import Timer
from dsv4.bench.traffic import storages, work_of
from dsv4.bench.waterfall import bars, table
from dsv4.bench.waterfall_plot import picture
from dsv4.errors import RequestError
from dsv4.kvcache import KVCache
from dsv4.model import Model

SPARE_TOKENS = 16  # of each sequence, beyond the timed steps: what capture and profiling append


class Step(Protocol):
    """What a bench needs of dsv4.engine.step.DecodeStep."""

    @property
    def kernels(self) -> int:
        """Kernel nodes of the graph."""

    def stage(self, slots: Sequence[int], tokens: Sequence[int]) -> object: ...

    def capture(self) -> object: ...

    def replay(self) -> object: ...


MakeStep = Callable[[Model, KVCache, int, int], Step]  # of so many rows, and tokens of a sequence at most


def bench_decode(
    model: Model,
    stored: Stored,
    run: Run,
    timer: Timer,
    make_step: MakeStep,
    *,
    batches: Sequence[int],
    contexts: Sequence[int],
    repeats: int = 30,
    warmup: int = 5,
    waterfall: bool = False,
    seed: int = 0,
) -> Iterator[Row]:
    """A row per batch and context: the median replay, the bytes it had to move, and the memory it took.

    The sequences have no past: their cache is filled with random entries (context.py). The routed experts that count
    are those the last replay chose; where the step does not tell, the expected number. waterfall: also where one replay
    went, as a table (`waterfall` in the row's `more`) and its picture. It is of a second graph, made when the first one
    was timed: one whose every tensor is kept, and whose layers, where they are one launch, note the time.
    """
    steps = warmup + repeats + SPARE_TOKENS
    longest = model.config.max_position_embeddings - steps
    if max(contexts) > longest:
        raise RequestError(
            f"a context of {max(contexts):,} tokens leaves no room for the {steps} that are timed and profiled: this "
            f"model ends at {model.config.max_position_embeddings:,}; give at most {longest:,}. Nothing was measured"
        )
    for batch in batches:
        for context in contexts:
            timer.reset_peak()
            cache = model.new_cache(batch, batch * (context + steps))
            slots = fill_context(cache, batch, context, room=steps, seed=seed)
            generator = torch.Generator().manual_seed(seed)
            tokens = torch.randint(0, model.config.vocab_size, (batch,), generator=generator).tolist()
            step = make_step(model, cache, batch, context + steps)
            step.stage(slots, tokens)
            with recording(timer.capturing, {"ffn_inputs"}) as calls:
                step.capture()
            step.stage(slots, tokens)
            times = timer.times(step.replay, repeats=repeats, warmup=warmup)
            us = statistics.median(times)
            layers = len(model.config.layers)
            measured = distinct_experts(calls, layers)
            distinct = measured or [expected_distinct(model.config, batch)] * layers
            parts = step_bytes(stored, model.config, cache, batch, context, distinct)
            values = {
                "batch": batch,
                "context": context,
                "us_per_step": round(us, 2),
                "bytes": parts.total,
                **speed(parts.total, us, run.copy_gb_s),
                "kernels": step.kernels,
            }
            more: dict[str, Any] = {
                "us_per_layer": round(us / layers, 3),
                "us_min": round(min(times), 2),
                "us_max": round(max(times), 2),
                "repeats": repeats,
                "tokens_per_s": round(batch / us * 1e6, 1),
                "bytes_by_part": asdict(parts),
                "distinct_experts": round(sum(distinct) / layers, 2),
                "distinct_measured": measured is not None,
                "peak_bytes": timer.peak_bytes(),
                "predicted_bytes": predicted_bytes(stored, model.config, batch, context + steps),
            }
            drawn = None
            if waterfall:
                clock = Clock()
                with recording(timer.capturing, given={"decode_layers": clock}) as calls:
                    step.capture()
                step.stage(slots, tokens)
                ran, held = timer.kernels_of(step.replay), storages(cache)
                step_bars = clock.split(bars(ran, work_of(calls, held)), held, model.config)
                more["waterfall"] = table(step_bars, layers, run.copy_gb_s)
                drawn = picture(step_bars, model.config, run, f"batch {batch}, context {context:,}")
            yield Row(run, values, more, drawn)
            del calls, step, cache
