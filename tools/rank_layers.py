"""All layers of random:flash in one launch at a rank's size, on one GPU: how long they take, and if they are right.

    python tools/rank_layers.py [--ranks 2] [--layers 16] [--rows 1,2,4,8] [--context 4096] [--longest 4160]
                                [--weights nvfp4]
    python tools/rank_layers.py --compare --layers 6 --rows 1,2,5,8

A rank of N has 1/N of the heads, output groups and expert channels; with these alone a GPU works as long as one of N
does, but for what the others tell it, which it tells itself. The launch is timed without what stands around it in a
step: a graph of eight, three medians of twenty graphs. So the first x of a launch is the last one of the launch before,
finite but not the step's. --longest: tokens that the step has room for in a sequence, by default few more than there
are. --compare: 12 steps as one launch and op by op, logits, tokens and every byte of the cache. The last line is one
JSON document; exits with 1 where bits differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any
from unittest.mock import patch

import torch

import dsv4
from dsv4.bench.context import fill_context
from dsv4.bench.timing import CudaTimer, Timer
from dsv4.config.releases import NAMED
from dsv4.engine.guard.bits import raw
from dsv4.engine.step import DecodeStep
from dsv4.errors import Dsv4Error
from dsv4.model import Model

SHARED = "num_attention_heads", "o_groups", "moe_intermediate_size"
STEPS, LAUNCHES, MEDIANS, REPEATS, WARMUP = 12, 8, 3, 20, 4
ROOM = 64  # tokens of a sequence beyond its context


def divided(name: str, ranks: int) -> dict[str, Any]:
    """The configuration `name` with what one of `ranks` has of every layer."""
    whole = NAMED[name]
    uneven = [key for key in SHARED if ranks < 1 or whole[key] % ranks]
    if uneven:
        raise SystemExit(f"--ranks {ranks}: {name} cannot be divided so; {', '.join(uneven)} must be multiples of it")
    return whole | {key: whole[key] // ranks for key in SHARED}


def step_of(model: Model, rows: int, context: int, longest: int, *, persistent: bool) -> tuple[DecodeStep, list[int]]:
    """A step of sequences of so many random entries, and their slots."""
    longest = max(longest, context + ROOM)
    cache = model.new_cache(rows, max(rows * (context + ROOM), longest))
    slots = fill_context(cache, rows, context, room=ROOM)
    return DecodeStep(model, cache, rows, max_length=longest, persistent=persistent), slots


def walk(model: Model, rows: int, context: int, longest: int, *, persistent: bool) -> list[torch.Tensor]:
    """What each of STEPS steps leaves, then the cache."""
    step, slots = step_of(model, rows, context, longest, persistent=persistent)
    if model.device != "cpu":
        step.capture()
    step.stage(slots, list(range(5, 5 + rows)))
    found = []
    for _ in range(STEPS):
        step.run()
        step.wait()
        for slot in slots:
            step.cache.advance(slot, 1)
        found += [step.logits.clone(), step.tokens.clone()]
    return [*found, *(x.clone() for layer in step.cache.layers for x in vars(layer).values())]


def differing(model: Model, rows: int, context: int, longest: int) -> int:
    """How many of a walk's tensors are not the same as one launch and op by op."""
    chain, launch = (walk(model, rows, context, longest, persistent=way) for way in (False, True))
    return sum(not torch.equal(raw(a), raw(b)) for a, b in zip(chain, launch, strict=True))


def times(model: Model, timer: Timer, rows: int, context: int, longest: int) -> list[float]:
    """Microseconds of the one launch: MEDIANS medians."""
    step, slots = step_of(model, rows, context, longest, persistent=True)
    step.stage(slots, list(range(5, 5 + rows)))
    assert step.layers is not None
    with torch.inference_mode():
        step.body()
        replay = timer.graph([step.layers] * LAUNCHES)
        found = [timer.times(replay, repeats=REPEATS, warmup=WARMUP) for _ in range(MEDIANS)]
    return [round(statistics.median(one) / LAUNCHES, 1) for one in found]


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:flash", choices=sorted(NAMED))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rows", default="1,2,4,8")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--longest", type=int, default=0)
    parser.add_argument("--weights", default="nvfp4", choices=("native", "nvfp4"))
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--device", default="cuda", help="cpu: --compare alone, where the launch is its twin")
    how = parser.parse_args(given)
    layers = None if how.model == "random:tiny" else how.layers
    part = divided(how.model, how.ranks)
    timer = None if how.compare else CudaTimer()
    with patch.dict(NAMED, {how.model: part}):
        model = dsv4.load(how.model, device=how.device, weights=how.weights, layers=layers)
    found: dict[str, Any] = {}
    for rows in map(int, how.rows.split(",")):
        if timer is None:
            found[str(rows)] = wrong = differing(model, rows, how.context, how.longest)
            print(f"{rows} rows: {f'{wrong} tensors differ' if wrong else 'equal in every bit'}", flush=True)
        else:
            found[str(rows)] = us = times(model, timer, rows, how.context, how.longest)
            print(f"{rows} rows: {' '.join(map(str, us))} us", flush=True)
    what = "differing" if how.compare else "us"
    print(json.dumps({**vars(how), what: found}))
    return int(how.compare and any(found.values()))


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except Dsv4Error as error:
        raise SystemExit(f"error: {error}") from None
