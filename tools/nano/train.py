"""Train nano. Seeded; resumes from its own checkpoint; the schedule runs over --seconds of wall clock, or over
--steps (exactly repeatable).

    python tools/nano/train.py --tokens .nano/tokens --out OUT --seconds 540 --graph
    python tools/nano/train.py --tokens .nano/tokens --out OUT --steps 6 --rows 2 --short 256 --long 512 --device cpu
        (smoke run)

Progress p in [0, 1] sets the phase: dense attention to the compressed entries until 0.40, then the indexer's top-k;
from 0.76 sequences of --long
tokens and quantised weights, KV, indexer and (in turns) activations. Training again from --start 0.5 is a second,
shorter round. Loss: LM + 0.3 MTP + indexer KL + 1e-4 sequence balance.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import fuse
import numpy as np
import torch
from data import Batches
from fakequant import Quant
from model import Losses, Nano, losses
from optim import Optimizer
from shape import CONFIG
from store import load_master, save_master

PLAIN = Quant()
# The modes of the quantised phase, in turns: weights as stored, three kinds of activations, and every linear in NVFP4.
TRAINED_IN = [
    Quant("native", "bf16", True, True),
    Quant("native", "fp8", True, True),
    Quant("native", "nvfp4", True, True),
    Quant("nvfp4", "nvfp4", True, True),
    Quant("nvfp4", "bf16", True, True),
    Quant("native", "fp8", True, True),
    Quant("nvfp4", "nvfp4", True, True),
    Quant("native", "bf16", False, False),
]


SELECT_FROM, LAST_FROM = 0.40, 0.76


def learning_rate(p: float) -> float:
    """Warm-up over 2 %, constant until 40 %, then linear to 2 %."""
    return min(1.0, p / 0.02 + 0.02) * min(1.0, 0.02 + 0.98 * (1 - p) / 0.6)


class Step:
    """One training step on fixed buffers; with graph=True each (shape, quantisation, selection) is captured once and
    replayed."""

    def __init__(self, model: Nano, optimizer: Optimizer, dtype: torch.dtype, graph: bool) -> None:
        self.model, self.optimizer, self.dtype, self.graph = model, optimizer, dtype, graph
        self.captured: dict[
            tuple[object, ...], tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor, torch.Tensor]
        ] = {}
        self.pool = None

    def compute(self, ids: torch.Tensor, weight: torch.Tensor, quant: Quant, select: bool) -> torch.Tensor:
        terms: Losses = losses(self.model, ids, weight, quant, select, self.dtype)
        (terms.lm + 0.3 * terms.mtp + terms.kl + 1e-4 * terms.balance).backward()
        self.optimizer.step()
        for p in self.model.parameters():
            p.grad = None
        for module in self.model.modules():
            if hasattr(module, "update_bias"):
                module.update_bias(1e-3)
        return torch.stack([t.detach() for t in terms])

    def __call__(self, ids: torch.Tensor, weight: torch.Tensor, quant: Quant, select: bool) -> torch.Tensor:
        if not self.graph:
            return self.compute(ids, weight, quant, select)
        key = (ids.shape, quant, select)
        if key not in self.captured:
            static = ids.clone(), weight.clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                first = self.compute(*static, quant, select)  # a real step: warm-up and training are the same here
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                out = self.compute(*static, quant, select)
            self.pool = self.pool or graph.pool()
            self.captured[key] = (graph, *static, out)
            return first
        graph, static_ids, static_weight, out = self.captured[key]
        static_ids.copy_(ids)
        static_weight.copy_(weight)
        graph.replay()
        return out.clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, help="length of the whole schedule on the clock")
    parser.add_argument("--steps", type=int, help="length of the whole schedule in steps, instead of --seconds")
    parser.add_argument("--stop", type=float, default=1.0, help="progress at which this run ends")
    parser.add_argument("--resume", type=Path, help="folder of a checkpoint written by this script")
    parser.add_argument(
        "--start", type=float, help="progress at which the run begins (default: 0, or where the checkpoint stands)"
    )
    parser.add_argument(
        "--rows", type=int, default=48, help="rows of --short tokens; long rows are fewer, for as many tokens"
    )
    parser.add_argument("--short", type=int, default=1024)
    parser.add_argument("--long", type=int, default=4096)
    parser.add_argument("--muon-lr", type=float, default=5e-3)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--text-share", type=float, default=0.62)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--graph", action="store_true", help="capture the step as CUDA graphs")
    parser.add_argument("--fuse", action="store_true", help="compile the elementwise passes (fuse.py)")
    parser.add_argument("--save-every", type=float, default=90.0, metavar="SECONDS")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    if args.fuse:
        fuse.enable()
    model = Nano(CONFIG).to(device).train()
    began, step = 0.0, 0
    if args.resume:
        state = load_master(args.resume, model)
        began, step = state["progress"], int(state["step"])
    began = args.start if args.start is not None else began
    optimizer = Optimizer(model, args.muon_lr, args.adam_lr)
    run = Step(model, optimizer, torch.bfloat16 if args.device == "cuda" else torch.float32, args.graph)
    batches = Batches(args.tokens, args.seed + step)
    args.out.mkdir(parents=True, exist_ok=True)
    log = (args.out / "log.jsonl").open("a")
    t0 = saved = time.monotonic()
    sums, seen, tokens, done = None, 0, 0, 0
    p = began
    while p < args.stop:
        done += 1
        p = began + ((time.monotonic() - t0) / args.seconds if args.seconds else done / args.steps)
        last = p >= LAST_FROM
        t = args.long if last else args.short
        rows = max(2, args.rows * args.short // t)
        ids, weight = (torch.from_numpy(a).to(device) for a in batches.batch(rows, t, args.text_share))
        optimizer.set_lr(learning_rate(min(p, 1.0)) * min(1.0, done / 50))  # a resumed run warms its moments up again
        terms = run(ids, weight, TRAINED_IN[step % len(TRAINED_IN)] if last else PLAIN, p >= SELECT_FROM)
        sums = terms if sums is None else sums + terms
        step, seen, tokens = step + 1, seen + 1, tokens + ids.numel()
        if done == 1 and args.seconds:
            t0 = time.monotonic()  # compiling took the first step's time, not the schedule's
        if step % 50 == 0 or p >= args.stop or (step <= 20 and step % 5 == 0):
            now = time.monotonic()
            record = {
                "step": step,
                "progress": round(p, 4),
                "seconds": round(now - t0, 1),
                "tokens": tokens,
                "t": t,
            } | dict(zip(Losses._fields, [round(v, 4) for v in (sums / seen).tolist()], strict=True))
            print(json.dumps(record), flush=True)
            log.write(json.dumps(record) + "\n")
            log.flush()
            sums, seen = None, 0
            if not np.isfinite(record["lm"]):
                raise SystemExit("the loss is not finite")
            if now - saved > args.save_every:
                save_master(args.out, model, {"progress": p, "step": step})
                saved = time.monotonic()
    save_master(args.out, model, {"progress": p, "step": step})
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
