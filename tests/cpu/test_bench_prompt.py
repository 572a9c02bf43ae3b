"""Where a prompt goes: calls as the config says, parts that add up, what is slow shows, ranks, and a CPU's clock."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_fakes import RUN, FakeTimer

from dsv4 import load
from dsv4.bench.clock import ClockTimer
from dsv4.bench.prefill import bench_prefill
from dsv4.bench.prompt import BESIDE, REST, WHOLE, Made, Timed, bars, table, time_calls
from dsv4.bench.record import recording
from dsv4.bench.roofline import stored_bytes
from dsv4.bench.timing import Timer
from dsv4.bench.waterfall import layers_of
from dsv4.config import ModelConfig
from dsv4.errors import KernelError
from dsv4.kernels.moe import moe_ref
from dsv4.kvcache import KVCache, rows_chunk
from dsv4.model import Model

LENGTH = 40
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def tiny() -> Model:
    return load("random:tiny")


def fall(model: Model, chunk: int, timer: Timer) -> tuple[Rows, Any]:
    how: dict[str, Any] = {"contexts": [LENGTH], "chunk": chunk, "repeats": 3, "waterfall": True}
    [row] = bench_prefill(model, stored_bytes("random:tiny", "native"), RUN, timer, **how)
    return row.more["waterfall"], row


def calls(rows: Rows) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in rows:
        if row["calls"]:
            found[row["op"]] = found.get(row["op"], 0) + row["calls"]
    return found


def us_of(rows: Rows, op: str) -> float:
    return sum(row["us"] for row in rows if row["op"] == op)


def calls_by_hand(config: ModelConfig, chunks: list[int]) -> dict[str, int]:
    """Of each op, out of what a layer is. A CSA layer selects where a sequence has more entries than it picks."""
    layers, n, read, selections = len(config.layers), len(chunks), 0, 0
    for rows in chunks:
        read += rows
        selections += sum(spec.kind == "csa" and read // spec.ratio > config.index_topk for spec in config.layers)
    once = dict.fromkeys(("host: plan", "embed", "mhc_pre", "mhc_post", "mhc_head"), n)
    each = ("attn_inputs", "sparse_attention", "grouped_linear", "ffn_inputs", "moe")
    # in_proj, wq_b and wo_b of attention; the router with w1 and w3, and w2 of the experts; an indexer's queries; head
    linears = n * (5 * layers + 1) + selections
    found = once | dict.fromkeys(each, n * layers) | {"mhc_seam": n * (2 * layers - 1), "rms_norm": 2 * n}
    found |= {"linear": linears} | ({"index_topk": selections} if selections else {})
    return found | {WHOLE: sum(found.values())}


@pytest.mark.parametrize(("chunk", "chunks"), [(64, [40]), (25, [25, 15])])
def test_calls_are_those_that_the_config_asks_for_and_parts_make_up_the_prompt(
    tiny: Model, chunk: int, chunks: list[int]
) -> None:
    rows, row = fall(tiny, chunk, ClockTimer())
    assert calls(rows) == calls_by_hand(tiny.config, chunks)
    rest, whole = rows[-2], rows[-1]
    assert (rest["op"], whole["op"], whole["time_share"]) == (REST, WHOLE, 1.0)
    assert 0 < rest["us"] < whole["us"] and all(part["us"] > 0 for part in rows)
    assert sum(part["us"] for part in rows[:-1]) == pytest.approx(whole["us"], abs=0.1 * len(rows))
    assert sum(part["time_share"] for part in rows[:-1]) == pytest.approx(1, abs=1e-4 * len(rows))
    assert sum(part["flop"] or 0 for part in rows) == row.more["flop"]
    config = tiny.config
    experts = 3 * config.num_experts_per_tok * config.hidden_size * config.moe_intermediate_size
    assert sum(part["flop"] for part in rows if part["op"] == "moe") == 2 * LENGTH * len(config.layers) * experts
    assert {part["op"] for part in rows if part["tflop_s"] is not None} == {"linear", "grouped_linear", "moe"}
    assert all(part["gb_s"] is not None for part in rows if part["op"] in ("mhc_seam", "sparse_attention"))
    assert (row.picture is not None) == (len(chunks) == 1) and (row.picture is None or "a prompt of 40" in row.picture)


class Still(FakeTimer):
    """A clock that goes on only while what is slowed down runs."""

    now = 0.0

    def mark(self) -> float:
        return self.now

    def between(self, first: float, last: float) -> float:
        return last - first

    def slowed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*args: Any, **kwargs: Any) -> Any:
            self.now += 50.0
            return function(*args, **kwargs)

        return slow


@pytest.mark.parametrize(
    ("holder", "name", "op", "times"),
    [(moe_ref, "down_ref", "moe", 5), (rows_chunk, "window_rows", "host: plan", 1), (KVCache, "advance", REST, 1)],
)
def test_what_is_slow_shows_as_slow_and_nothing_else_does(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, holder: Any, name: str, op: str, times: int
) -> None:
    timer = Still()
    monkeypatch.setattr(holder, name, timer.slowed(getattr(holder, name)))
    rows, _ = fall(tiny, 64, timer)
    assert {row["op"]: row["us"] for row in rows if row["us"]} == {op: 50 * times, WHOLE: 50 * times}


# -------------------------------------------------------------------------------------------- a device that lags behind


class Lagging(FakeTimer):
    """A device that takes `us` for every mark after the first and never waits; the host asks at once."""

    def __init__(self, us: float):
        self.us, self.marks = us, -1

    def mark(self) -> float:
        self.marks += 1
        return self.marks * self.us

    def between(self, first: float, last: float) -> float:
        return last - first


def test_times_are_those_of_the_device_and_the_host_is_ahead_of_it(tiny: Model) -> None:
    cache, slow = tiny.new_cache(1, LENGTH), 10_000_000.0

    def launch() -> None:
        slot = cache.acquire()
        tiny.forward([(slot, torch.arange(LENGTH))], cache)
        cache.release(slot)

    timed, whole = time_calls(launch, Lagging(slow))
    assert whole == slow * (2 * len(timed) + 1)
    assert [(one.start, one.end) for one in timed] == [
        (slow * (2 * i + 1), slow * (2 * i + 2)) for i in range(len(timed))
    ]
    assert all(0.5 * one.start < one.ahead <= one.start for one in timed)
    timed, _ = time_calls(launch, ClockTimer())
    assert statistics.median(one.ahead for one in timed) < 1000  # a host that does the work itself is never ahead


GEMM = Made("linear", "[9, 4] x 1 MB", 4000, 8_000_000)
MADE = [Made("mhc_pre"), GEMM, Made("ranks: sum"), Made("moe"), Made("mhc_seam", "", 600), GEMM, Made("moe"),
        Made("mhc_post")]  # fmt: skip
TIMED = [Timed(2, 10, 0), Timed(10, 30, 7), Timed(35, 45, 12), Timed(45, 60, 20),
         Timed(60, 64, 9), Timed(64, 84, 5), Timed(84, 94, 9), Timed(94, 95, 9)]  # fmt: skip


def test_the_table_by_hand() -> None:
    rows = table(MADE, TIMED, 100.0, 2, 4.0, 2.0)
    assert [row["op"] for row in rows] == [
        "mhc_pre",
        "linear",
        "ranks: sum",
        "moe",
        "mhc_seam",
        "mhc_post",
        REST,
        WHOLE,
    ]
    assert [row["us"] for row in rows] == [8, 40, 10, 25, 4, 1, 12, 100]
    linear = rows[1]
    assert (linear["calls"], linear["us_per_call"], linear["us_per_layer"], linear["time_share"]) == (2, 20, 20, 0.4)
    assert (linear["flop"], linear["tflop_s"], linear["dense_share"]) == (16_000_000, 0.4, 0.2)
    assert (linear["bytes"], linear["gb_s"], linear["share"], linear["ahead_us"]) == (8000, 0.2, 0.05, 5)
    assert rows[2]["flop"] is rows[2]["gb_s"] is rows[-2]["calls"] is rows[-1]["us_per_call"] is None
    assert rows[-1]["calls"] == 8 and rows[-2]["us_per_layer"] == 6


def test_calls_are_the_bars_of_layers() -> None:
    found = bars(MADE, TIMED)
    assert [bar.gap for bar in found] == [2, 0, 5, 0, 0, 0, 0, 0] and sum(bar.visible for bar in found) == 95
    assert [[bar.op for bar in layer] for layer in layers_of(found)] == [
        ["mhc_pre", "linear", "ranks: sum", "moe"],
        ["mhc_seam", "linear", "moe"],
    ]
    with pytest.raises(ValueError, match="zip"):
        bars(MADE, TIMED[:-1])


def test_what_is_no_op_is_recorded_by_its_name_and_put_back(tiny: Model) -> None:
    before = [vars(holder)[name] for holder, name in BESIDE.values()]
    cache = tiny.new_cache(1, 8)
    with recording(lambda: True, {"embed"}, also=BESIDE, begin=lambda: "noted") as found:
        assert all(vars(holder)[name] is not old for (holder, name), old in zip(BESIDE.values(), before, strict=True))
        tiny.forward([(cache.acquire(), torch.arange(8))], cache)
    assert [(call.op, call.begun) for call in found] == [("host: plan", "noted"), ("embed", "noted")]
    assert [vars(holder)[name] for holder, name in BESIDE.values()] == before


# ----------------------------------------------------------------------------------------------------- ranks and clock


def test_two_ranks_print_one_table_with_their_sums() -> None:
    command = [sys.executable, "-m", "dsv4.cli", "bench", "prefill", "nano", "--device", "cpu", "--no-csv"]
    options = ["--context", str(LENGTH), "--repeats", "3", "--waterfall", "--tp", "2", "--experts", "ep-a2a"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("where a prompt of 40 tokens goes") == 1
    document = json.loads(done.stdout.splitlines()[-1])
    rows, layers = document["rows"][0]["waterfall"], document["layers"]
    expected = {"ranks: sum": 2 * layers, "ranks: gather": 1, "ranks: exchange": layers, "moe": layers}
    assert calls(rows).items() >= expected.items() and min(us_of(rows, op) for op in expected) > 0


def test_the_clock_of_a_cpu() -> None:
    timer, done = ClockTimer(), []
    times = timer.times(lambda: done.append(time.sleep(0.01)), repeats=3, warmup=2)
    assert len(done) == 5 and len(times) == 3 and min(times) >= 10_000
    assert timer.copy_gb_s() > 0.1 and timer.dense_tflop_s() > 0 and timer.peak_bytes() > 10_000_000
    for refused in (lambda: timer.graph([]), lambda: timer.kernels_of(done.clear), timer.l2_bytes):
        with pytest.raises(KernelError, match="GPU"):
            refused()
