"""`dsv4 bench kernels`: every op of a decode step alone, at the step's own shapes, with weights that are not in cache.

The ops are recorded while a step is captured. Calls of one op with equal shapes (one per layer, mostly) take turns in
one graph; where all their weights together would stay in L2, copies of the operands join until they do not.

A graph holds 64 launches or more that follow each other as in a step: each may start while the one in front still runs
(programmatic dependent launch; so are all kernels of a decode step but those that quantise its activations), so that
what it does before its turn, reading weights too, lies beside that one. us is what one launch adds; a launch by itself
takes longer by its ramp-up, which a step does not pay either. In a step the kernel in front is another one.
"""

from __future__ import annotations

import copy
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from dsv4.bench.context import fill_context
from dsv4.bench.decode import SPARE_TOKENS, MakeStep
from dsv4.bench.record import Call, is_operand, recording
from dsv4.bench.report import Row, Run, speed
from dsv4.bench.timing import Timer
from dsv4.bench.traffic import moved_bytes, storages, weight_bytes
from dsv4.kernels.linear.launch import Launcher
from dsv4.model import Model

COLD = 4  # times L2 that must pass between two uses of a weight
MAX_COPIES = 64
COPY_LIMIT_BYTES = 8 << 30  # operands are not copied beyond this: larger ones are cold anyway
LAUNCHES = 64  # at least, per graph
BIG_BYTES = 5_000_000  # weights of a call that should come at AIM of copy bandwidth
AIM = 0.8


def bench_kernels(
    model: Model,
    run: Run,
    timer: Timer,
    make_step: MakeStep,
    *,
    batches: Sequence[int],
    context: int,
    repeats: int = 20,
) -> Iterator[Row]:
    """A row per batch, op and shape of one decode step of so many sequences of `context` tokens, in its order."""
    for batch in batches:
        timer.reset_peak()  # and the memory of the batch before is free
        yield from _of_step(model, run, timer, make_step, batch, context, repeats)


def _of_step(
    model: Model, run: Run, timer: Timer, make_step: MakeStep, batch: int, context: int, repeats: int
) -> Iterator[Row]:
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
        nbytes = [moved_bytes(call, held) for call in group]
        weights = sum(weight_bytes(call) for call in group)
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
            "weight_bytes": round(weights / len(group)),
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
    args = tuple(copied(value) if is_operand(value) else value for value in call.args)
    return Call(call.op, call.function, args, call.kwargs, call.result)


def copied(operand: Any) -> Any:
    """An operand on weights of its own. A launcher, which holds their addresses, is made anew."""
    memo: dict[int, Any] = {}
    launcher = getattr(operand, "launcher", None)
    if launcher is not None:
        for part in launcher.parts:
            scale = None if part.block_scale is None else part.block_scale.clone()
            memo[id(part)] = replace(part, tiles=part.tiles.clone(), block_scale=scale)
        memo[id(launcher)] = fresh = Launcher([memo[id(part)] for part in launcher.parts])
        fresh.cold = launcher.cold
    return copy.deepcopy(operand, memo)


def by_batch(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """The columns of all batches side by side, and a line per op and shape: `us share` by batch, the shape and weights
    of the first. Ops meet their like by what is behind the first sizes of their shapes, which go with the batch.
    """
    lines: dict[tuple[str, str, int], dict[str, Any]] = {}
    seen: Counter[tuple[int, str, str]] = Counter()
    for row in rows:
        batch, op, shape = row.values["batch"], row.values["op"], row.values["shape"]
        like = re.sub(r"\[\d+", "[", shape)
        key = op, like, seen[batch, op, like]
        seen[batch, op, like] += 1
        weights = row.values["weight_bytes"]
        big = "yes" if weights > BIG_BYTES else None
        line = lines.setdefault(key, {"op": op, "shape": shape, "weight_bytes": weights or None, "over_5_MB": big})
        line[f"at_{batch}"] = f"{row.values['us']:.1f} {row.values['share']:4.0%}"
    return tuple(dict.fromkeys(f"at_{row.values['batch']}" for row in rows)), list(lines.values())


def verdict(rows: Sequence[Row]) -> str:
    """How many products of the smallest batch with more than 5 MB of weights reach 80 % of copy bandwidth."""
    least = min(row.values["batch"] for row in rows)
    big = [row.values for row in rows if row.values["batch"] == least and row.values["weight_bytes"] > BIG_BYTES]
    under = [f"{values['op']} {values['shape']} {values['share']:.1%}" for values in big if values["share"] < AIM]
    count = f"{len(big) - len(under)} of {len(big)} products with more than 5 MB of weights"
    words = f"batch {least}: {count} reach {AIM:.0%} of copy bandwidth"
    return words + ("; below: " + ", ".join(under) if under else "")
