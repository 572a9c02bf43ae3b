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
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from peer_humming import Humming
from torch import Tensor

from dsv4.bench.kernels import COLD, LAUNCHES, MAX_COPIES
from dsv4.bench.report import Row, Run, speed, this_commit, write_csv
from dsv4.bench.timing import CudaTimer, Timer
from dsv4.errors import Dsv4Error
from dsv4.kernels.case import Maker, nbytes
from dsv4.kernels.linear.linear import linear
from dsv4.kernels.linear.operand import LinearOperand, linear_operand
from dsv4.kernels.moe.moe import moe
from dsv4.kernels.moe.operand import ExpertsOperand, experts_operand
from dsv4.quant.weights import NVFP4Weight

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
LIMIT = 10.0  # of SwiGLU
ROUTINGS = 16  # of the experts, that take turns
REPLAYS = 3  # of each graph in each round
#: How far a row of results may be from the exact one, relative to its length, and one result relative to the row's
#: mean square. A rounding to BF16 errs by at most 2^-9 of what is rounded. Gate, up, SwiGLU's result, the experts'
#: results and their sum: five of them. A sum of S parts that is rounded after each part: S errors that grow with the
#: running sum and add up as squares, sqrt(S / 2) 2^-9, below 2^-6 up to S = 128; no kernel here has more parts.
ROW_ERROR = 2.0**-6
ONE_ERROR = 8 * ROW_ERROR

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Size:
    """Routed experts: E, D, F, K."""

    experts: int = 256
    width: int = 4096
    inner: int = 2048
    topk: int = 6


class Peer(Protocol):
    """A library of kernels. What it makes of weights is bound to its input: each result is a call for a graph."""

    name: str
    version: str

    def ready(self) -> None:
        """Wait for what was begun: nothing else is to run while graphs are captured and timed."""

    def linear(self, weight: NVFP4Weight, batches: Sequence[int]) -> Callable[[Tensor], Call]:
        """weight [N, K] -> x [B, K] -> a call that gives x @ weight^T [B, N]. It may compile for `batches`."""

    def experts(
        self, w13: NVFP4Weight, w2: NVFP4Weight, topk: int, limit: float, batches: Sequence[int]
    ) -> Callable[[Tensor, Tensor], Call]:
        """w13 [E, 2F, D], gate before up, and w2 [E, D, F] -> x [B, D], ids [B, K] -> a call that gives what each
        expert makes of its token [B * K, D], without weights; `limit` is SwiGLU's."""


@dataclass(frozen=True)
class Subject:
    """One op at one batch. bind: who -> calls that take weights in turn; exact and value: what a first call of `who`
    should give and gives, float64 [B, N]; nbytes: of one call."""

    op: str
    shape: str
    batch: int
    bind: dict[str, Callable[[], list[Call]]]
    exact: Tensor
    value: Callable[[Tensor], Tensor]
    nbytes: int


def nvfp4(make: Maker, *shape: int, scale: Tensor | None = None) -> NVFP4Weight:
    """All codes, block scales of 0.5 to 1.9, results of deviation about 1; `scale`: the global one, else one here."""
    *lead, rows, columns = shape
    codes = make.integers(0, 256, *lead, rows, columns // 2).to(torch.uint8)
    blocks = make.integers(0x30, 0x40, *lead, rows, columns // 16).to(torch.uint8).view(torch.float8_e4m3fn)
    if scale is None:
        scale = (make.uniform(*lead) + 0.5) * 0.3 * columns**-0.5
    return NVFP4Weight(codes, blocks, scale)


def copies(operand_bytes: int, l2: int) -> int:
    """How many weights take turns, that none is in L2 when its turn comes again."""
    return min(MAX_COPIES, math.ceil(COLD * l2 / operand_bytes))


def dense(
    make: Maker, peers: Sequence[Peer], shape: tuple[str, int, int], batches: Sequence[int], l2: int
) -> Callable[[], Iterator[Subject]]:
    """Starts what the peers compile; then the subjects of one projection."""
    op, columns, rows = shape
    weight = nvfp4(make, rows, columns)
    first = {peer.name: attempt(peer.linear, weight, batches) for peer in peers}

    def subjects() -> Iterator[Subject]:
        count, exact = copies(weight.nbytes, l2), weight.dequantize().double().T
        mine = [linear_operand(weight, act="bf16") for _ in range(count)]
        theirs = {
            peer.name: [first[peer.name], *(attempt(peer.linear, weight, batches) for _ in range(count - 1))]
            for peer in peers
        }
        for batch in batches:
            x = make.normal(batch, columns, dtype="bf16")
            bind = {"dsv4": partial(own_linears, x, mine)}
            bind |= {name: partial(their_linears, x, several) for name, several in theirs.items()}
            moved = weight.nbytes + nbytes(x) + batch * rows * x.element_size()
            yield Subject(op, f"{columns} -> {rows}", batch, bind, x.double() @ exact, Tensor.double, moved)

    return subjects


def own_linears(x: Tensor, operands: Sequence[LinearOperand]) -> list[Call]:
    def calling(operand: LinearOperand) -> Call:
        return lambda: linear(x, operand)[0]

    return [calling(operand) for operand in operands]


def their_linears(x: Tensor, several: Sequence[Any]) -> list[Call]:
    return [given(one)(x) for one in several]


def experts(make: Maker, peers: Sequence[Peer], size: Size, batches: Sequence[int]) -> Callable[[], Iterator[Subject]]:
    """Starts what the peers compile; then the subjects of the routed experts."""
    w1 = nvfp4(make, size.experts, size.inner, size.width)
    w3 = nvfp4(make, size.experts, size.inner, size.width, scale=w1.global_scale)
    w2 = nvfp4(make, size.experts, size.width, size.inner)
    w13 = NVFP4Weight(torch.cat([w1.codes, w3.codes], 1), torch.cat([w1.scale, w3.scale], 1), w1.global_scale)
    theirs = {peer.name: attempt(peer.experts, w13, w2, size.topk, LIMIT, batches) for peer in peers}
    mine = experts_operand(w1, w2, w3, act="bf16")

    def subjects() -> Iterator[Subject]:
        for batch in batches:
            x = make.normal(batch, size.width, dtype="bf16", scale=4)  # some of it is clamped
            shared = make.normal(batch, size.width, dtype="bf16")
            routing = Routing(
                [make.uniform(batch, size.experts).topk(size.topk).indices for _ in range(ROUTINGS)],
                make.uniform(batch, size.topk) + 0.1,
                shared,
            )
            bind = {"dsv4": partial(own_experts, x, mine, routing)}
            bind |= {name: partial(their_experts, x, one, routing) for name, one in theirs.items()}
            used = statistics.mean(len(ids.unique()) for ids in routing.turns) / size.experts
            moved = round((w13.nbytes + w2.nbytes) * used) + 2 * nbytes(x)
            shape = f"{size.topk} of {size.experts}, {size.width} x {size.inner}"
            exact = exact_experts(x, routing, w13, w2)
            yield Subject("experts", shape, batch, bind, exact, routing.summed, moved)

    return subjects


@dataclass(frozen=True)
class Routing:
    """turns: ids [B, K] of each; weights [B, K] f32; shared [B, D], what the shared expert gives."""

    turns: list[Tensor]
    weights: Tensor
    shared: Tensor

    def summed(self, result: Tensor) -> Tensor:
        """[B, D] float64, of ours or of what each expert made [B * K, D]."""
        if result.shape == self.shared.shape:
            return result.double()
        each = result.double().unflatten(0, self.weights.shape)
        return (each * self.weights.double().unsqueeze(-1)).sum(1) + self.shared.double()


def own_experts(x: Tensor, operand: ExpertsOperand, routing: Routing) -> list[Call]:
    def calling(ids: Tensor) -> Call:
        return lambda: moe(x, operand, ids, routing.weights, routing.shared, limit=LIMIT)

    return [calling(ids) for ids in routing.turns]


def their_experts(x: Tensor, made: Any, routing: Routing) -> list[Call]:
    return [given(made)(x, ids) for ids in routing.turns]


def exact_experts(x: Tensor, routing: Routing, w13: NVFP4Weight, w2: NVFP4Weight) -> Tensor:
    """The experts of the first turn in float64, one by one: -> [B, D]."""
    ids, result = routing.turns[0], routing.shared.double()
    for expert in ids.unique().tolist():
        tokens, places = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[tokens].double() @ w13.select(expert).dequantize().double().T).chunk(2, dim=-1)
        middle = gate.clamp(max=LIMIT) * gate.clamp(max=LIMIT).sigmoid() * up.clamp(-LIMIT, LIMIT)
        out = middle @ w2.select(expert).dequantize().double().T
        result.index_add_(0, tokens, out * routing.weights[tokens, places].double().unsqueeze(-1))
    return result


def attempt(function: Callable[..., Any], *args: Any) -> Any:
    """The result, or the exception: what a peer cannot make is said when its turn comes."""
    try:
        return function(*args)
    except Exception as failure:
        return failure


def given(made: Any) -> Any:
    if isinstance(made, Exception):
        raise made
    return made


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
