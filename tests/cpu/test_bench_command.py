"""What dsv4 bench measures, prints, writes and refuses, with a clock and a decode step that need no GPU."""

from __future__ import annotations

import csv
import importlib
import json
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_fakes import RUN, FakeStep, FakeTimer
from cli_helpers import Program

from dsv4 import load
from dsv4.bench import report
from dsv4.bench.decode import SPARE_TOKENS, bench_decode
from dsv4.bench.kernels import bench_kernels
from dsv4.bench.plot import lines, plot
from dsv4.bench.prefill import bench_prefill
from dsv4.bench.roofline import stored_bytes
from dsv4.bench.timing import CudaTimer
from dsv4.errors import KernelError, RequestError
from dsv4.model import Model


@pytest.fixture(scope="module")
def tiny() -> Model:
    return load("random:tiny")


# -------------------------------------------------------------------------------------------------------- benches


def test_decode_gives_medians_and_shares_per_batch_and_context(tiny: Model) -> None:
    FakeStep.made.clear()
    stored = stored_bytes("random:tiny", "native")
    sweep: dict[str, Any] = {"batches": [1, 3], "contexts": [20, 90], "repeats": 20, "warmup": 2}
    rows = list(bench_decode(tiny, stored, RUN, FakeTimer(), FakeStep, **sweep))
    assert [(row.values["batch"], row.values["context"]) for row in rows] == [(1, 20), (1, 90), (3, 20), (3, 90)]
    assert [rows_ for rows_, _ in FakeStep.made] == [1, 1, 3, 3]
    for row in rows:
        values, more = row.values, row.more
        assert values["us_per_step"] == 109.5 and (more["us_min"], more["us_max"]) == (100, 119)
        assert values["gb_s"] == pytest.approx(values["bytes"] / 109.5e3, abs=0.05)
        assert values["share"] == pytest.approx(values["bytes"] / 109.5e3 / 4000, abs=1e-4)
        assert sum(more["bytes_by_part"].values()) == values["bytes"]
        assert values["kernels"] == 77 and more["distinct_measured"] and more["peak_bytes"] == 12345
    assert rows[0].more["distinct_experts"] == 3 and rows[2].more["distinct_experts"] > 3
    assert rows[0].picture is None and "waterfall" not in rows[0].more


def test_a_context_without_room_is_refused_before_anything_runs(tiny: Model) -> None:
    longest = tiny.config.max_position_embeddings - (2 + 20 + SPARE_TOKENS)
    sweep: dict[str, Any] = {"batches": [1], "contexts": [20, longest + 1], "repeats": 20, "warmup": 2}
    found = bench_decode(tiny, stored_bytes("random:tiny", "native"), RUN, FakeTimer(), FakeStep, **sweep)
    with pytest.raises(RequestError, match=f"give at most {longest:,}"):
        next(found)


def test_a_waterfall_says_where_the_step_goes(tiny: Model) -> None:
    stored = stored_bytes("random:tiny", "native")
    sweep: dict[str, Any] = {"batches": [1], "contexts": [20], "repeats": 20, "waterfall": True}
    [row] = bench_decode(tiny, stored, RUN, FakeTimer(), FakeStep, **sweep)
    ops = {op["op"]: op for op in row.more["waterfall"]}
    assert list(ops) == ["mhc_seam", "ffn_inputs", "moe", "torch: other", "mhc_post", "step"]
    assert ops["ffn_inputs"]["us"] == 10 and ops["ffn_inputs"]["launches"] == 5 and ops["ffn_inputs"]["gb_s"] > 0
    assert ops["moe"]["shape"].startswith("[1, ") and ops["moe"]["bytes"] > 0  # as many launches as calls
    assert ops["torch: other"]["us"] == 25 and ops["torch: other"]["bytes"] is None and ops["step"]["us"] == 57
    assert row.picture is not None and "layer 4" in row.picture
    last = {spec.kind: place for place, spec in enumerate(tiny.config.layers)}
    assert [f"layer {place}, {kind}: 11.0 us" in row.picture for kind, place in last.items()] == [True] * len(last)


def test_kernels_gives_a_row_per_op_and_shape(tiny: Model) -> None:
    rows = list(bench_kernels(tiny, RUN, FakeTimer(), FakeStep, batches=[2], context=40, repeats=5))
    ops = [row.values["op"] for row in rows]
    assert {"linear", "moe", "ffn_inputs", "sparse_attention", "mhc_pre"} <= set(ops)
    assert all(row.values["us"] > 0 and row.values["bytes"] > 0 for row in rows)
    moe = [row for row in rows if row.values["op"] == "moe"]
    assert sum(row.values["calls"] for row in moe) == len(tiny.config.layers)
    assert set(report.OP_COLUMNS) <= rows[0].columns.keys()


def test_prefill_counts_weights_once_per_chunk(tiny: Model) -> None:
    stored = stored_bytes("random:tiny", "native")
    how: dict[str, Any] = {"contexts": [40], "repeats": 3, "warmup": 0}
    [whole] = bench_prefill(tiny, stored, RUN, FakeTimer(), chunk=64, **how)
    [halves] = bench_prefill(tiny, stored, RUN, FakeTimer(), chunk=20, **how)
    assert 1.8 < halves.values["bytes"] / whole.values["bytes"] < 2.01
    assert whole.more["tokens_per_s"] == pytest.approx(40 / 101e-6, abs=0.1)


# ----------------------------------------------------------------------------------------------- files and commands


def a_row(**values: Any) -> report.Row:
    given = {"batch": 1, "context": 4096, "us_per_step": 10.0, "bytes": 5, "gb_s": 1.0, "share": 0.25, "kernels": 9}
    return report.Row(RUN, given | values)


def test_the_csv_grows_under_one_header(tmp_path: Path) -> None:
    path = report.write_csv(tmp_path, "decode", [a_row(), a_row(batch=4)])
    assert path is not None and path.parent.name == "fake-gpu"
    assert report.write_csv(tmp_path, "decode", [a_row(batch=64, share=0.5)]) == path
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == report.COLUMNS and [row["batch"] for row in rows] == ["1", "4", "64"]
    assert rows[0]["model"] == "random:tiny" and rows[0]["tp"] == "1" and rows[0]["command"] == "dsv4 bench decode"
    assert report.write_csv(tmp_path, "decode", []) is None
    path.write_text("a,b\n")
    with pytest.raises(RequestError, match="its header is not model,layers"):
        report.write_csv(tmp_path, "decode", [a_row()])
    with pytest.raises(RequestError, match="its columns are not those"):
        report.read_csv(path)


def test_a_plot_is_svg_with_a_line_per_context(tmp_path: Path) -> None:
    rows = [a_row(batch=b, context=c, share=b / 100) for b in (1, 4, 64) for c in (4096, 65536)]
    path = report.write_csv(tmp_path, "decode", [*rows, a_row(batch=4, share=0.9)])
    assert path is not None
    picture = tmp_path / "x.svg"
    plot(path, picture)
    root = xml.etree.ElementTree.parse(picture).getroot()
    assert len([e for e in root if e.tag.endswith("polyline")]) == 2
    found = lines(report.read_csv(path))
    assert found["random:tiny, 5 layers, bf16, 4,096 tokens"] == {1: 0.01, 4: 0.9, 64: 0.64}
    with pytest.raises(RequestError, match="no such file"):
        plot(tmp_path / "none.csv", picture)


def test_names_and_numbers_for_people() -> None:
    assert report.slug("NVIDIA H200") == "h200" and report.slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert report.text("share", 0.256) == "25.6%" and report.text("peak_bytes", 5_000_000) == "5.0 MB"
    assert report.text("kernels", None) == "-" and report.text("context", 65536) == "65,536"
    assert report.this_commit()


@pytest.fixture
def dsv4(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Program:
    command = importlib.import_module("dsv4.cli.bench")  # the package's attribute of that name is the command group
    monkeypatch.setattr(command, "make_timer", lambda device: FakeTimer())
    monkeypatch.setattr(command, "decode_step", lambda *, chain: FakeStep)
    return Program(capsys)


def test_commands_print_a_table_then_one_line_of_json(dsv4: Program, tmp_path: Path) -> None:
    common = ("random:tiny", "--device", "cpu", "--results", tmp_path)
    done = dsv4("bench", "decode", *common, "--batch", "1,2", "--context", "30,60", "--waterfall")
    assert done.code == 0, done.err
    document = json.loads(done.out.splitlines()[-1])
    assert document["bench"] == "decode" and len(document["rows"]) == 4 and document["copy_gb_s"] == 4000
    assert document["model"] == "random:tiny" and document["layers"] == 5 and document["rows"][0]["waterfall"]
    assert "distinct experts" in done.out and "gap us" in done.out and "4 rows added" in done.err
    done = dsv4("bench", "prefill", *common, "--context", "40", "--chunk", 16, "--repeats", 3)
    assert done.code == 0 and json.loads(done.out.splitlines()[-1])["rows"][0]["chunk"] == 16, done.err
    assert "dense share" in done.out and json.loads(done.out.splitlines()[-1])["rows"][0]["dense_tflop_s"] == 800
    done = dsv4("bench", "prefill", *common, "--context", "40", "--chunk", 64, "--repeats", 3, "--waterfall")
    assert done.code == 0 and "between calls" in done.out and "ahead us" in done.out, done.err
    done = dsv4("bench", "kernels", *common, "--context", "40", "--repeats", 3, "--no-csv")
    assert done.code == 0 and {row["op"] for row in json.loads(done.out.splitlines()[-1])["rows"]} >= {"moe"}, done.err
    assert "batch 1: " in done.out.splitlines()[-2] and "weight bytes" in done.out
    done = dsv4("bench", "kernels", *common, "--context", "40", "--repeats", 3, "--batch", "1,2")
    assert done.code == 0 and "at 1" in done.out and "at 2" in done.out and "over 5 MB" in done.out, done.err
    assert {row["batch"] for row in json.loads(done.out.splitlines()[-1])["rows"]} == {1, 2}
    done = dsv4("bench", "kernels", *common, "--prefill", 40, "--repeats", 3)
    document = json.loads(done.out.splitlines()[-1])
    assert done.code == 0 and document["bench"] == "gemms" and "tflop s" in done.out, done.err
    files = sorted(path.name.split("-", 3)[3] for path in (tmp_path / "fake-80gb").iterdir())
    pictures = [f"waterfall-random-tiny-5-tp1-bf16-batch{b}-context{c}.svg" for b in (1, 2) for c in (30, 60)]
    benches = "decode", "gemms", "kernels", "prefill", "prefill-waterfall", "waterfall"
    of_prompt = "prefill-waterfall-random-tiny-5-tp1-bf16-batch1-context40.svg"
    assert files == sorted([*(f"bench-{what}.csv" for what in benches), of_prompt, *pictures])
    [falls] = (tmp_path / "fake-80gb").glob("*bench-waterfall.csv")
    with falls.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == report.WATERFALL_COLUMNS and [line["op"] for line in lines].count("step") == 4
    [falls] = (tmp_path / "fake-80gb").glob("*bench-prefill-waterfall.csv")
    with falls.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == report.PROMPT_COLUMNS and lines[-1]["op"] == "prompt" and lines[-1]["chunk"] == "40"
    [decode] = (tmp_path / "fake-80gb").glob("*bench-decode.csv")
    done = dsv4("bench", "plot", decode)
    assert done.code == 0 and decode.with_suffix(".svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["decode", "--batch", "1,x"], 2, "give whole numbers of"),
        (["decode", "--context", "0"], 2, "give whole numbers"),
        (["decode", "--repeats", "3"], 2, "20"),
        (["prefill", "--chunk", "0"], 2, "chunk"),
        (["kernels", "--batch", "0"], 2, "batch"),
        (["kernels", "--prefill", "0"], 2, "prefill"),
        (["plot", "nothing.csv"], 1, "error: nothing.csv: no such file"),
    ],
)
def test_wrong_arguments_are_named(dsv4: Program, args: list[str], code: int, words: str) -> None:
    done = dsv4("bench", *args)
    assert done.code == code and words in done.err


@pytest.mark.parametrize("what", ["decode", "kernels"])
def test_graphs_are_timed_on_a_gpu_alone(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = Program(capsys)("bench", what, "random:tiny", "--device", "cpu")
    assert done.code == 1 and done.out == "" and "measure the GPU, not device 'cpu'" in done.err


@pytest.mark.parametrize("what", ["decode", "prefill", "kernels"])
def test_without_a_gpu_there_is_one_error(
    what: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = Program(capsys)("bench", what, "random:flash")
    assert done.code == 1 and done.out == ""
    assert done.err == "error: dsv4 bench measures a CUDA GPU, and torch sees none here; nothing was measured\n"
    with pytest.raises(KernelError):
        CudaTimer()
