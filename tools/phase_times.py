"""Where one decode_layers launch spends its time, phase by phase: CSV on stdout.

    python tools/phase_times.py random:flash --layers 8 --batch 1 --context 4096
    torchrun --nproc-per-node 2 tools/phase_times.py random:flash --batch 1

For each kind of phase: how many a step has; the mean us from its first block's begin to that of the next phase (`us`)
and to the end of its last block (`work_us`); what is between these, in which blocks meet (`meeting_us`); the median
block's own time (`block_us`). `inputs` go on beside `queries` and begin with them. Weights are requantised to NVFP4.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch

from dsv4.bench.context import fill_context
from dsv4.engine.step import DecodeStep
from dsv4.kernels.decode_layers.decode_layers import decode_layers
from dsv4.kernels.decode_layers.describe import overlapped
from dsv4.model import load
from dsv4.parallel.mesh import join

ROOM = 64  # tokens of a sequence beyond its context
FOLLOWED_BY = {"Inputs": "queries", "Experts": "router, w1, w3"}


def names(step: DecodeStep) -> list[str]:
    """Of the phases in the kernel's order; an Experts record is two of them."""
    assert step.layers is not None
    kinds = [type(phase).__name__ for phase in overlapped(step.layers.program.phases)[0]]
    found: list[str] = []
    for place, kind in enumerate(kinds):
        before = kinds[place - 1] if place else "Seam"
        after = kinds[place + 1] if place + 1 < len(kinds) else ""
        if kind == "Experts":
            found += ["route", "experts"]
        elif kind != "Linear":
            found.append(kind.lower())
        else:
            first = "in_proj" if before == "Seam" else "wo_a" if before == "Attention" else "wo_b"
            found.append(FOLLOWED_BY.get(after, first))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=8)
    given = parser.parse_args()
    mesh = join(int(os.environ["WORLD_SIZE"]), "cuda") if "RANK" in os.environ else None
    model = load(given.model, device="cuda", weights="nvfp4", layers=given.layers, tp=mesh)
    cache = model.new_cache(given.batch, given.batch * (given.context + ROOM))
    slots = fill_context(cache, given.batch, given.context, room=ROOM, seed=0)
    step = DecodeStep(model, cache, given.batch, max_length=given.context + ROOM, persistent=True)
    assert step.layers is not None
    program, order = step.layers.program, names(step)
    assert program.tables is not None and program.tables.count == len(order)
    times = torch.zeros(len(order), program.tables.grid, 2, dtype=torch.int64, device=model.device)
    runs = []
    with torch.inference_mode():
        for turn in range(given.repeats + 2):
            step.stage(slots, [turn] * given.batch)
            step.body()
            decode_layers(program.h, program, times=times)
            torch.cuda.synchronize()
            if turn > 1:
                runs.append(times.double() / 1000)
    if mesh is not None and mesh.rank:
        return
    all_runs = torch.stack(runs).cpu()  # [repeats, phases, blocks, 2] us
    begin, end = all_runs[..., 0].min(2).values, all_runs[..., 1].max(2).values
    until = torch.cat([begin[:, 1:], end[:, -1:]], dim=1)
    own = (all_runs[..., 1] - all_runs[..., 0]).median(2).values
    print("phase,count,us,work_us,meeting_us,block_us")
    for name in dict.fromkeys(order):
        at = [place for place, found in enumerate(order) if found == name]
        us, work, block = (x[:, at].mean().item() for x in (until - begin, end - begin, own))
        print(f'"{name}",{len(at)},{us:.2f},{work:.2f},{us - work:.2f},{block:.2f}')
    whole = (end[:, -1] - begin[:, 0]).median().item()
    layers = len(model.config.layers)
    print(f"{given.model}: {layers} layers in {whole:.1f} us, {whole / layers:.1f} a layer", file=sys.stderr)


if __name__ == "__main__":
    main()
