"""Phases of the one launch of all layers as bars: whose they are, what they move, when they ran by a made-up clock."""

from __future__ import annotations

import csv
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_fakes import FakeTimer
from cli_helpers import Program
from torch import Tensor

from dsv4 import load
from dsv4.bench.context import fill_context
from dsv4.bench.phases import Clock, Span, phase_bars, phase_work, spans
from dsv4.bench.record import recording
from dsv4.bench.timing import Kernel
from dsv4.bench.traffic import Work, storages
from dsv4.bench.waterfall import Bar, layers_of, table
from dsv4.engine.step import DecodeStep
from dsv4.errors import KernelError
from dsv4.kernels.decode_layers.phases import Attention, Linear
from dsv4.kvcache import KVCache
from dsv4.model import Model

SINCE_1970 = 1_795_000_000_123_456_789  # ns: a double cannot tell it from the next hundred
GRID = 132
PHASE_US, MEETING_US = 4.0, 1.0  # of the made-up clock; every other block is half as long


@pytest.fixture(scope="module")
def tiny() -> Model:
    return load("random:tiny")


def made_step(model: Model, cache: KVCache, rows: int, longest: int) -> DecodeStep:
    return DecodeStep(model, cache, rows, max_length=longest, persistent=True)


def work_at(model: Model, rows: int, context: int, grid: int = GRID) -> tuple[DecodeStep, KVCache, list[Work]]:
    cache = model.new_cache(rows, rows * (context + 20))
    slots = fill_context(cache, rows, context, room=16)
    step = made_step(model, cache, rows, context + 16)
    step.stage(slots, [1] * rows)
    step.run()
    assert step.layers is not None
    return step, cache, phase_work(step.layers.program.phases, storages(cache), model.config, grid)


def clock_of(phases: int) -> Tensor:
    """Times [phases, 3 blocks, 2]: phases of PHASE_US with meetings between them; one block takes no part in the second
    of them."""
    times = torch.zeros(phases, 3, 2, dtype=torch.int64)
    for place in range(phases):
        begin = SINCE_1970 + round(place * (PHASE_US + MEETING_US) * 1000)
        times[place, :, 0] = begin
        times[place, :, 1] = begin + torch.tensor([2000, 4000, 2000])
    times[1:2, 2] = 0
    return times


# ---------------------------------------------------------------------------------------------- names and bytes


@pytest.mark.parametrize("grid", [GRID, 24])
def test_phases_have_the_names_of_their_places_in_the_order_of_the_kernel(tiny: Model, grid: int) -> None:
    _, _, work = work_at(tiny, 1, 90, grid)
    ends = ["attention", "wo_a", "wo_b", "seam", "router, w1, w3", "route", "experts"]
    expected: list[str] = []
    for place, spec in enumerate(tiny.config.layers):
        begin = ["queries", "inputs"]
        if spec.kind == "csa":  # eight blocks of 24 are too many to multiply in the others meanwhile
            begin = ["index queries", "inputs", "index", "queries beside index"] if grid == GRID else [*begin, "index"]
        expected += [*(["seam"] if place else []), "in_proj", *begin, *ends]
    assert [one.op for one in work] == expected


def test_products_that_wait_for_their_inputs_keep_their_names(tiny: Model) -> None:
    step, cache, _ = work_at(tiny, 1, 90)
    assert step.layers is not None
    phases = list(step.layers.program.phases)
    first, _, queries = phases[:3]
    assert isinstance(queries, Linear) and isinstance(first, Linear)
    phases[2] = Linear((*queries.products, *first.products))  # of two inputs: not normed by themselves
    found = phase_work(phases, storages(cache), tiny.config, GRID)
    assert [one.op for one in found[:4]] == ["in_proj", "inputs", "queries", "attention"]


def test_bytes_are_the_weights_the_rows_and_the_experts_that_are_expected(tiny: Model) -> None:
    for rows in (1, 2):
        step, _, work = work_at(tiny, rows, 300)
        assert step.layers is not None
        program, config = step.layers.program, tiny.config
        of_experts = sum(block.ffn.experts.nbytes for block in tiny.blocks)
        miss = (1 - config.num_experts_per_tok / config.n_routed_experts) ** rows
        expected = of_experts * (1 - miss) + len(tiny.blocks) * 2 * rows * config.hidden_size * 2
        assert sum(one.nbytes for one in work if one.op == "experts") == pytest.approx(expected, abs=5)
        into, attention = program.phases[0], next(p for p in program.phases if isinstance(p, Attention))
        assert isinstance(into, Linear)
        [product] = into.products
        tensors = [product.x, *product.out]
        assert work[0].nbytes == tiny.blocks[0].attn.in_proj.nbytes + sum(x.nbytes for x in tensors)
        assert work[0].shape.startswith(f"[{rows}, {config.hidden_size}] x ")
        q, ring, seen = attention.args[:3]
        given = [q, seen, *attention.args[5:], attention.named["turn"], *attention.out]  # a window layer: no pool
        entries = rows * min(config.sliding_window, 300)
        assert work[3].op == "attention"
        assert work[3].nbytes == sum(x.nbytes for x in given) + entries * ring.shape[-1] * ring.element_size()


# -------------------------------------------------------------------------------------------------------- times


def test_a_span_is_from_the_first_begin_to_the_last_end_and_nanoseconds_are_not_lost() -> None:
    times = clock_of(3)
    times[2, 0, 0] -= 3  # ns
    found = spans(times)
    assert [(span.start, span.end) for span in found] == [(0, 4), (5, 9), (9.997, 14)]
    assert [span.block for span in found] == [2, 2, 2.003]  # of the second, two blocks: the lower of them
    with pytest.raises(KernelError, match="some of its 3 phases"):
        spans(times * torch.tensor([1, 0, 1]).view(3, 1, 1))


def test_phases_take_the_place_of_their_launch_and_add_up_to_it() -> None:
    launch = Bar("decode_layers", "", 5, start=90.0, end=120.0, before=100.0)
    work = [Work("in_proj", "[1, 4] x 1 MB", 1000), Work("queries", "", 2000), Work("inputs", "", 0)]
    found = phase_bars(launch, work, [Span(0, 5, 4), Span(6, 12, 5), Span(6, 11, 1)])
    assert [bar.op for bar in found] == ["phase: in_proj", "phase: queries", "phase: inputs"]
    assert [bar.nbytes for bar in found] == [1000, 2000, 0] and found[0].shape == "[1, 4] x 1 MB"
    assert [(bar.start, bar.end) for bar in found] == [(108, 113), (114, 120), (114, 119)]
    assert [bar.gap for bar in found] == [8, 1, 0] and [bar.visible for bar in found] == [13, 7, 0]
    assert sum(bar.visible for bar in found) == launch.visible and [bar.block for bar in found] == [4, 5, 1]
    with pytest.raises(KernelError, match="noted 1 phases where its program has 3"):
        phase_bars(launch, work, [Span(0, 5, 4)])


def test_the_table_has_meetings_and_blocks_of_phases() -> None:
    launch = Bar("decode_layers", "", 0, 0.0, 20.0, 0.0)
    bars = phase_bars(launch, [Work("seam", "", 4_000)] * 2, [Span(0, 9, 6.0), Span(10, 20, 7.0)])
    seam, step = table([*bars, Bar("sample", "", 0, 20.0, 25.0, 20.0)], 1, 4000.0)[::2]
    assert (seam["op"], seam["launches"], seam["us"], seam["gap_us"]) == ("phase: seam", 2, 20, 1)
    assert (seam["bytes"], seam["gb_s"], seam["share"]) == (8000, 0.4, 0.0001)
    assert (seam["own_us"], seam["block_us"]) == (19, 6.5) and step["block_us"] is None and step["us"] == 25


def test_layers_are_told_apart_by_phases_too(tiny: Model) -> None:
    _, _, work = work_at(tiny, 1, 90)
    whole = Bar("decode_layers", "", 0, 5.0, 500.0, 5.0)
    step = [Bar("mhc_pre", "", 0, 0.0, 5.0, 0.0), *phase_bars(whole, work, spans(clock_of(len(work))))]
    layers = layers_of([*step, Bar("mhc_post", "", 0, 500.0, 502.0, 500.0)])
    assert len(layers) == len(tiny.config.layers) and layers[0][0].op == "mhc_pre"
    assert all(layer[0].op == "phase: seam" for layer in layers[1:])
    assert all(layer[-1].op == "phase: experts" for layer in layers)


def test_the_clock_is_given_once_per_program_and_not_on_a_cpu(tiny: Model) -> None:
    step, cache, _ = work_at(tiny, 1, 90)
    assert step.layers is not None
    clock, seen = Clock(), []
    with recording(lambda: True, {"decode_layers"}, given={"decode_layers": lambda *given: seen.append(given) or {}}):
        step.body()
    assert seen == [(step.layers.entered.h, step.layers.program)] and clock(*seen[0]) == {} and clock.noted == []
    bars = [Bar("decode_layers", "", 7, 0.0, 9.0, 0.0)]
    assert clock.split(bars, storages(cache), tiny.config) == bars
    clock.noted = [(step.layers.program, clock_of(1))] * 2
    with pytest.raises(KernelError, match="1 launches of decode_layers, of which 2 were timed"):
        clock.split(bars, storages(cache), tiny.config)


# -------------------------------------------------------------------------------------------------- the command


class FakeClock(Clock):
    def __call__(self, h: Tensor, program: Any) -> dict[str, Any]:
        phases = len(program.phases) + sum(type(phase).__name__ == "Experts" for phase in program.phases)
        self.noted = [(program, clock_of(phases))]
        return {}


class OneLaunch(FakeTimer):
    """A launch that enters the layers, all of them, and one that leaves."""

    def kernels_of(self, launch: Any) -> list[Kernel]:
        launch()
        names = ("mhc_pre", 0, 4), ("decode_layers", 2, 300), ("mhc_post", 300, 302)
        return [Kernel(f"(anonymous namespace)::{name}(Args)", a, b) for name, a, b in names]


class Captured(DecodeStep):
    kernels = 16  # type: ignore[assignment]

    def capture(self) -> None:
        FakeTimer.capture = True
        self.body()
        FakeTimer.capture = False

    def replay(self) -> None:
        self.run()


def captured(model: Model, cache: KVCache, rows: int, longest: int) -> Captured:
    return Captured(model, cache, rows, max_length=longest, persistent=True)


def test_the_waterfall_of_one_launch_shows_its_phases(
    tiny: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = importlib.import_module("dsv4.cli.bench")
    monkeypatch.setattr(command, "make_timer", lambda device: OneLaunch())
    monkeypatch.setattr(command, "decode_step", lambda *, chain: captured)
    monkeypatch.setattr("dsv4.bench.decode.Clock", FakeClock)
    monkeypatch.setattr("sys.argv", ["dsv4", "bench"])  # the output names the command
    common = ("random:tiny", "--device", "cpu", "--results", tmp_path, "--repeats", 20)
    done = Program(capsys)("bench", "decode", *common, "--context", 40, "--waterfall")
    assert done.code == 0, done.err
    assert "phase: in_proj" in done.out and "block us" in done.out and "decode_layers" not in done.out
    [falls] = (tmp_path / "fake-80gb").glob("*bench-waterfall.csv")
    with falls.open(newline="") as file:
        lines = {(line["op"], line["shape"]): line for line in csv.DictReader(file)}
    assert not any(op == "decode_layers" for op, _ in lines)
    layers, seams = len(tiny.config.layers), lines["phase: seam", ""]
    assert int(seams["launches"]) == 2 * layers - 1 and float(seams["gap_us"]) == (2 * layers - 1) * MEETING_US
    assert float(seams["us"]) == (2 * layers - 1) * (PHASE_US + MEETING_US) and float(seams["block_us"]) == 2
    assert int(seams["bytes"]) > 0 and seams["gb_s"] and seams["share"]
    assert float(lines["step", ""]["us"]) == 302 == sum(float(x["us"]) for x in lines.values()) - 302
    [picture] = (tmp_path / "fake-80gb").glob("*waterfall*.svg")
    drawn = picture.read_text()
    last = {spec.kind: place for place, spec in enumerate(tiny.config.layers)}
    assert all(f"layer {place}, {kind}: " in drawn for kind, place in last.items())
    assert drawn.count("phase: attention") == len(last) and "phase: index" in drawn
    [row] = json.loads(done.out.splitlines()[-1])["rows"]
    assert row["us_per_step"] == 109.5 and row["distinct_experts"] == 3  # the step that is timed has no clock
