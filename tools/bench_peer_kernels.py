"""Our `linear` and `moe` beside the FP4 kernels that a user would otherwise take, on one GPU in one run: a CSV.

    pip install humming-kernels==0.1.19
    python tools/bench_peer_kernels.py --out results [--batch 1,2,4,8,16,32,64] [--only wq_b,experts] [--rounds 5]

The projections of V4-Flash and its routed experts as NVFP4, activations BF16. Every kernel gets the same codes and
scales, packed as it likes, and is used as its own documentation says, in the configuration that it picks itself. Each
result is first held against float64 arithmetic on the values that the bytes stand for. Then calls run in CUDA graphs
which take weights in turn, so that they are not in L2; rounds of ours and of the peer alternate, the median counts.

Of `experts` ours is the whole op: who goes where, gate and up, SwiGLU, down, the weighted sum with the shared expert.
The peer's time is that of its two products and its activation alone; who goes where is laid out for it beforehand.

A row of the CSV is one kernel at one batch: `share` is of the copy bandwidth that the same run measured, `ratio` how
many times ours its time is. What fails, or computes something else, gets a row with `error`, and the rest goes on.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peer_humming import Humming
from peer_subjects import Peer, Size, Subject, attempt, dense, experts, given
from torch import Tensor

from dsv4.bench.kernels import LAUNCHES
from dsv4.bench.report import Row, Run, speed, this_commit, write_csv
from dsv4.bench.timing import CudaTimer, Timer
from dsv4.errors import Dsv4Error
from dsv4.kernels.case import Maker

COLUMNS = tuple("op shape batch who us bytes gb_s share ratio error copy_gb_s gpu torch version commit command".split())
BATCHES = (1, 2, 4, 8, 16, 32, 64)
DENSE = (
    ("wq_a+wkv", 4096, 1536),
    ("wq_b", 1024, 32768),
    ("wo_b", 8192, 4096),
    ("shared w1+w3", 4096, 4096),
    ("shared w2", 2048, 4096),
    ("wide", 4096, 32768),
)
REPLAYS = 3  # of each graph in each round
#: How far a row of results may be from the exact one, relative to its length, and one result relative to the row's
#: mean square. A rounding to BF16 errs by at most 2^-9 of what is rounded. Gate, up, SwiGLU's result, the experts'
#: results and their sum: five of them. A sum of S parts that is rounded after each part: S errors that grow with the
#: running sum and add up as squares, sqrt(S / 2) 2^-9, below 2^-6 up to S = 128; no kernel here has more parts.
ROW_ERROR = 2.0**-6
ONE_ERROR = 8 * ROW_ERROR


def check(value: Tensor, exact: Tensor) -> None:
    """Raise ValueError where results [B, N] are not those of the exact arithmetic, rounding apart."""
    if value.shape != exact.shape:
        raise ValueError(f"the result has shape {list(value.shape)}, expected {list(exact.shape)}")
    error, mean = (value - exact).abs(), exact.square().mean(-1, keepdim=True).sqrt()
    row, one = (error.square().mean(-1, keepdim=True).sqrt() / mean).max().item(), (error / mean).max().item()
    if not (row <= ROW_ERROR and one <= ONE_ERROR):
        raise ValueError(f"wrong: a row is {row:.2g} from the exact one (allowed {ROW_ERROR:.2g}), a result {one:.2g}")


def measure(subject: Subject, timer: Timer, rounds: int) -> dict[str, float | str]:
    """us per call of everyone, in rounds that alternate; or what went wrong, in words."""
    replays: dict[str, tuple[Any, int]] = {}
    found: dict[str, float | str] = {}
    for who, bind in subject.bind.items():
        try:
            calls = bind()
            check(subject.value(calls[0]()), subject.exact)
            calls *= -(-LAUNCHES // len(calls))
            replays[who] = timer.graph(calls), len(calls)
        except Exception as failure:
            found[who] = reason(failure)
    times: dict[str, list[float]] = {who: [] for who in replays}
    for _ in range(rounds):
        for who, (replay, count) in list(replays.items()):
            try:
                times[who] += [us / count for us in timer.times(replay, repeats=REPLAYS, warmup=1)]
            except Exception as failure:
                found[who] = reason(failure)
                del replays[who]
    return found | {who: statistics.median(times[who]) for who in replays}


def reason(failure: Exception) -> str:
    first = str(failure).strip().splitlines()[:1]
    return f"{type(failure).__name__}: {first[0] if first else ''}"[:300]


def rows_of(
    subject: Subject, found: dict[str, float | str], versions: dict[str, str], run: Run
) -> tuple[list[Row], str]:
    """Rows for the CSV, and a line to read."""
    rows, words = [], [f"{subject.op:14s}{subject.shape:24s}{subject.batch:4d}"]
    ours = found["dsv4"]
    for who in subject.bind:
        us = found[who]
        values: dict[str, Any] = {"op": subject.op, "shape": subject.shape, "batch": subject.batch, "who": who}
        values |= {"us": "", "bytes": subject.nbytes, "gb_s": "", "share": "", "ratio": "", "error": ""}
        values |= {"copy_gb_s": round(run.copy_gb_s, 1), "torch": torch.__version__, "version": versions[who]}
        if isinstance(us, str):
            values["error"] = us
            words.append(f"{who} {us}")
        else:
            values |= {"us": round(us, 3), **speed(subject.nbytes, us, run.copy_gb_s)}
            words.append(f"{who}{us:8.2f} us ({values['share']:.0%})")
            if isinstance(ours, float) and who != "dsv4":
                values["ratio"] = round(us / ours, 3)
                words.append(f"x {us / ours:.2f}")
        rows.append(Row(run, values))
    return rows, "  ".join(words)


def bench(
    peers: Sequence[Peer],
    timer: Timer,
    out: Path,
    *,
    batches: Sequence[int] = BATCHES,
    shapes: Sequence[tuple[str, int, int]] = DENSE,
    size: Size | None = Size(),
    rounds: int = 5,
    device: str = "cuda",
    command: str = "",
) -> Path | None:
    """Measure and print everything; -> the CSV, written op by op."""
    make = Maker(torch.device(device))
    run = Run("V4-Flash", 1, 1, "bf16", timer.name(), timer.copy_gb_s(), this_commit(), command)
    versions = {"dsv4": run.commit} | {peer.name: peer.version for peer in peers}
    print(f"{run.gpu}, copy {run.copy_gb_s:.0f} GB/s, torch {torch.__version__}, {versions}", flush=True)
    path = None
    with torch.inference_mode():
        l2 = timer.l2_bytes()
        ready = {shape[0]: attempt(dense, make, peers, shape, batches, l2) for shape in shapes}
        if size is not None:
            ready["experts"] = attempt(experts, make, peers, size, batches)
        for peer in peers:
            peer.ready()
        for op in list(ready):
            rows: list[Row] = []
            try:
                for subject in given(ready.pop(op))():
                    more, line = rows_of(subject, measure(subject, timer, rounds), versions, run)
                    rows += more
                    print(line, flush=True)
            except Exception as failure:
                print(f"{op:14s}stopped: {reason(failure)}", flush=True)
            path = write_csv(out, "peers", rows, COLUMNS) or path
    return path


def main(peers: Sequence[Callable[[], Peer]] = (Humming,)) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the CSV")
    parser.add_argument("--batch", default=",".join(map(str, BATCHES)))
    parser.add_argument("--only", default=",".join([*(op for op, _, _ in DENSE), "experts"]), help="ops, with commas")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    only = asked.only.split(",")
    unknown = set(only) - {op for op, _, _ in DENSE} - {"experts"}
    if unknown:
        parser.error(f"--only {','.join(sorted(unknown))}: no such op; there are {parser.get_default('only')}")
    try:
        path = bench(
            [peer() for peer in peers],
            CudaTimer(),
            asked.out,
            batches=[int(batch) for batch in asked.batch.split(",")],
            shapes=[shape for shape in DENSE if shape[0] in only],
            size=Size() if "experts" in only else None,
            rounds=asked.rounds,
            command=shlex.join(["python", "tools/bench_peer_kernels.py", *sys.argv[1:]]),
        )
    except Dsv4Error as wrong:
        sys.exit(f"error: {wrong}")
    print(path)


if __name__ == "__main__":
    main()
