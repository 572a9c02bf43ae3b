"""`dsv4 bench kernels`: every op of a decode step alone, at the step's own shapes, with weights that are not in cache.

The ops are recorded while a step is captured. Calls of one op with equal shapes (one per layer, mostly) take turns in
one graph; where all their weights together would stay in L2, copies of the operands join until they do not.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterator, Sequence

import torch

from dsv4.bench.context import fill_context
from dsv4.bench.decode import SPARE_TOKENS, MakeStep
from dsv4.bench.record import Call, is_operand, recording
from dsv4.bench.report import Row, Run, speed
from dsv4.bench.timing import Timer
from dsv4.bench.traffic import moved_bytes, storages
from dsv4.model import Model

COLD = 4  # times L2 that must pass between two uses of a weight
MAX_COPIES = 64
COPY_LIMIT_BYTES = 8 << 30  # operands are not copied beyond this: larger ones are cold anyway
LAUNCHES = 64  # at least, per graph


def bench_kernels(
    model: Model, run: Run, timer: Timer, make_step: MakeStep, *, batch: int, context: int, repeats: int = 20
) -> Iterator[Row]:
    """A row per op and shape of one decode step of `batch` sequences of `context` tokens, in the step's order."""
    cache = model.new_cache(batch, batch * (context + SPARE_TOKENS))
    slots = fill_context(cache, batch, context, room=SPARE_TOKENS)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (batch,), generator=generator).tolist()
    step = make_step(model, cache, batch, context + SPARE_TOKENS)
    step.stage(slots, tokens)
    with recording(timer.capturing) as calls:
        step.capture()
    step.stage(slots, tokens)
    step.replay()  # gives every recorded tensor its contents
    held = storages(cache)
    for (op, shape), group in grouped(calls).items():
        nbytes = [moved_bytes(call, held, model.config) for call in group]
        turns = with_copies(group, sum(nbytes), timer.l2_bytes())
        turns *= -(-LAUNCHES // len(turns))
        with torch.inference_mode():
            replay = timer.graph([call.again for call in turns])
            us = statistics.median(timer.times(replay, repeats=repeats, warmup=2)) / len(turns)
        mean = round(sum(nbytes) / len(nbytes))
        values = {
            "batch": batch,
            "context": context,
            "op": op,
            "shape": shape,
            "calls": len(group),
            "us": round(us, 3),
            "bytes": mean,
            **speed(mean, us, run.copy_gb_s),
        }
        yield Row(run, values, {"us_per_step": round(us * len(group), 2), "distinct_operands": len({*map(id, turns)})})


def grouped(calls: Sequence[Call]) -> dict[tuple[str, str], list[Call]]:
    """Calls by op and shapes of what they get, in the order in which they first appear."""
    groups: dict[tuple[str, str], list[Call]] = {}
    for call in calls:
        groups.setdefault((call.op, call.shape), []).append(call)
    return groups


def with_copies(group: list[Call], nbytes: int, l2: int) -> list[Call]:
    """The calls, and as many more on copies of their operands as it takes to move COLD times L2 in one turn."""
    wanted = min(MAX_COPIES, math.ceil(COLD * l2 / max(nbytes, 1)))
    operands = sum(value.nbytes for call in group for value in call.args if is_operand(value))
    if not operands:
        return list(group)  # activations alone: they are warm in a real step too
    wanted = min(wanted, COPY_LIMIT_BYTES // operands)
    return list(group) + [_copied(call) for _ in range(wanted - 1) for call in group]


def _copied(call: Call) -> Call:
    args = tuple(copy.deepcopy(value) if is_operand(value) else value for value in call.args)
    return Call(call.op, call.function, args, call.kwargs, call.result)
