"""`dsv4 bench kernels --prefill N`: the products of a prompt of N tokens, each shape alone, beside a dense BF16 one."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator

import torch

from dsv4.bench.flop import GEMMS, flop_of, rows_of
from dsv4.bench.record import Call, recording
from dsv4.bench.report import Row, Run, rate
from dsv4.bench.timing import Timer
from dsv4.model import Model

LAUNCHES = 4  # per graph


def bench_gemms(model: Model, run: Run, timer: Timer, *, rows: int, repeats: int = 20) -> Iterator[Row]:
    """A row per op of GEMMS and shape that multiplies `rows` rows in a prefill of so many tokens, in its order. The
    first call of a shape is timed, on the inputs and with the routing that it had there.
    """
    dense = timer.dense_tflop_s()
    first: dict[tuple[str, str], Call] = {}
    count: Counter[tuple[str, str]] = Counter()

    def keep(call: Call) -> None:
        if rows_of(call) == rows:
            first.setdefault((call.op, call.shape), call)
            count[call.op, call.shape] += 1

    cache = model.new_cache(1, rows)
    ids = torch.randint(0, model.config.vocab_size, (rows,), generator=torch.Generator().manual_seed(0))
    with recording(lambda: True, GEMMS, keep=keep):
        model.forward([(cache.acquire(), ids)], cache)
    for (op, shape), call in first.items():
        with torch.inference_mode():
            replay = timer.graph([call.again] * LAUNCHES)
            us = statistics.median(timer.times(replay, repeats=repeats, warmup=2)) / LAUNCHES
        flop, calls = flop_of(call), count[op, shape]
        values = {"rows": rows, "op": op, "shape": shape, "calls": calls, "us": round(us, 2), "flop": flop}
        more = {"us_per_step": round(us * calls, 1), "dense_tflop_s": round(dense, 1)}
        yield Row(run, values | rate(flop, us, dense), more)
