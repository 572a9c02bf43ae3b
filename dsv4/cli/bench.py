"""`dsv4 bench`: how fast decode steps, prompts and single kernels run on this machine's GPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dsv4.bench import report
from dsv4.bench.clock import ClockTimer
from dsv4.bench.decode import MakeStep, bench_decode
from dsv4.bench.gemms import bench_gemms
from dsv4.bench.kernels import bench_kernels, by_batch, verdict
from dsv4.bench.plot import plot
from dsv4.bench.prefill import bench_prefill
from dsv4.bench.roofline import Stored, stored_bytes
from dsv4.bench.timing import CudaTimer, Timer
from dsv4.cli.console import note, put, speaks
from dsv4.cli.groups import command
from dsv4.cli.options import LoadOptions, ModelArgument
from dsv4.errors import RequestError
from dsv4.kvcache import KVCache
from dsv4.model import Model
from dsv4.parallel.shard import Share

bench = typer.Typer(help="Measure decode, prefill and kernels on a CUDA GPU.", no_args_is_help=True)


@dataclass(frozen=True)
class BenchLoad(LoadOptions):
    """As elsewhere, but on the GPU unless told otherwise."""

    device: Annotated[str, typer.Option(help="The GPU.", envvar="DSV4_DEVICE", rich_help_panel="Loading")] = "cuda"


@dataclass(frozen=True)
class Output:
    """Where figures go."""

    results: Annotated[Path, typer.Option(help="The CSV grows in a folder per GPU in here.")] = Path("results")
    csv: Annotated[bool, typer.Option("--csv/--no-csv", help="Write it.")] = True

    def write(self, what: str, rows: Sequence[report.Row], columns: Sequence[str] = report.COLUMNS) -> None:
        path = report.write_csv(self.results, what, rows, columns) if self.csv and speaks() else None
        if path is not None:
            note(f"{len(rows)} rows added to {path}")

    def waterfall(self, what: str, row: report.Row, columns: Sequence[str]) -> None:
        """The table's rows and the picture."""
        about = {key: value for key, value in {**row.more, **row.values}.items() if key in columns}
        lines = [report.Row(row.run, about | line) for line in row.more["waterfall"]]
        self.write(what, lines, columns)
        path = report.write_picture(self.results, what, row) if self.csv and speaks() else None
        if path is not None:
            note(f"drawn in {path}")


Numbers = Annotated[str, typer.Option(help="One number, or several joined by commas.")]
Repeats = Annotated[int, typer.Option(min=3, help="Timed runs; their median counts.")]


@command
def decode(
    model: ModelArgument,
    batch: Numbers = "1",
    context: Numbers = "4096",
    repeats: Annotated[int, typer.Option(min=20, help="Timed replays; their median counts.")] = 30,
    waterfall: Annotated[
        bool, typer.Option("--waterfall", help="Also where the step goes, by op, and a picture of its layers.")
    ] = False,
    chain: Annotated[
        bool, typer.Option("--chain", help="The ops of layers one by one, not all layers at once.")
    ] = False,
    *,
    load: BenchLoad,
    output: Output,
) -> None:
    """Time one decode step as one replay of its CUDA graph, for every batch and context.

    Contexts are random cache entries, so none is read first. share is of the copy bandwidth measured in the same run.
    --waterfall profiles one replay. Kernels start while the one in front still runs, so us there is what a launch
    adds: its end minus the latest end before it, gap_us of that with nothing running. own_us counts waiting twice.
    Where all layers are one launch, their phases stand in its place, by the kernel's own clock; gap_us is then the
    meeting of blocks in front, block_us the median block's own time in one phase.
    """
    batches, contexts = _numbers(batch, "--batch"), _numbers(context, "--context")
    timer, loaded, stored, run = _open(model.resolve(), load)
    how: dict[str, Any] = {"repeats": repeats, "waterfall": waterfall}
    found = bench_decode(
        loaded, stored, run, timer, decode_step(chain=chain), batches=batches, contexts=contexts, **how
    )
    rows = _collect(found)
    _print(f"decode, {_about(run)}", rows, ("batch", "context", "us_per_step", "bytes", "gb_s", "share", "kernels",
           "tokens_per_s", "distinct_experts", "peak_bytes", "predicted_bytes"))  # fmt: skip
    for row in rows if waterfall else ():
        title = f"where a step goes, batch {row.values['batch']}, context {row.values['context']:,}"
        columns = report.WATERFALL_COLUMNS[8:-3]
        report.console().print(report.table(title, row.more["waterfall"], columns, ("op", "shape")))
        output.waterfall("waterfall", row, report.WATERFALL_COLUMNS)
    output.write("decode", rows)
    put(report.json_line("decode", rows), end="\n")


@command
def prefill(
    model: ModelArgument,
    context: Numbers = "4096",
    chunk: Annotated[int, typer.Option(min=1, help="Tokens of one call.")] = 2048,
    repeats: Repeats = 5,
    waterfall: Annotated[
        bool, typer.Option("--waterfall", help="Also where the prompt goes, by op, and a picture of its layers.")
    ] = False,
    *,
    load: BenchLoad,
    output: Output,
) -> None:
    """Time prompts of random tokens into an empty cache, the host's work included; also on --device cpu.

    tflop_s counts the linears and experts alone; dense_share is of a dense BF16 product's rate in the same run.
    --waterfall marks every call of one more prompt on the device: us is from when all in front is done to the call's
    end, `between calls` what none accounts for, ahead_us how far the host was ahead of the device where it was least:
    about 0 where the device waited for it. Of several ranks, the first one's.
    """
    contexts = _numbers(context, "--context")
    timer, loaded, stored, run = _open(model.resolve(), load, graphs=False)
    how: dict[str, Any] = {"chunk": chunk, "repeats": repeats, "waterfall": waterfall}
    rows = _collect(bench_prefill(loaded, stored, run, timer, contexts=contexts, **how))
    columns = ("context", "chunk", "us_per_step", "tokens_per_s", "tflop_s", "dense_share", "bytes", "gb_s", "share",
               "peak_bytes")  # fmt: skip
    _print(f"prefill, {_about(run)}", rows, columns)
    for row in rows if waterfall else ():
        title = f"where a prompt of {row.values['context']:,} tokens goes"
        shown = [name for name in report.PROMPT_COLUMNS[8:-3] if name != "flop"]
        report.console().print(report.table(title, row.more["waterfall"], shown, ("op", "shape")))
        output.waterfall("prefill-waterfall", row, report.PROMPT_COLUMNS)
    output.write("prefill", rows)
    put(report.json_line("prefill", rows), end="\n")


@command
def kernels(
    model: ModelArgument,
    batch: Numbers = "1",
    context: Annotated[int, typer.Option(min=1, help="Tokens that each sequence has.")] = 4096,
    prefill: Annotated[
        int | None, typer.Option(min=1, help="Instead, the products of a prompt of so many tokens.")
    ] = None,
    repeats: Repeats = 20,
    *,
    load: BenchLoad,
    output: Output,
) -> None:
    """Time every op of a decode step alone, at the model's shapes, on weights that are not in the cache.

    For every batch; launches follow each other with early starts, as in a step. At the end all batches side by side.
    --prefill times the linears and experts at so many rows, beside a dense BF16 product in the same run.
    """
    batches = _numbers(batch, "--batch")
    timer, loaded, _, run = _open(model.resolve(), load)
    if prefill is not None:
        rows = _collect(bench_gemms(loaded, run, timer, rows=prefill, repeats=repeats))
        columns: tuple[str, ...] = ("calls", "us", "us_per_step", "tflop_s", "dense_share", "dense_tflop_s")
        _print(f"products of {prefill:,} rows, {_about(run)}", rows, columns, ("op", "shape"))
        output.write("gemms", rows, report.GEMM_COLUMNS)
        put(report.json_line("gemms", rows), end="\n")
        return
    rows = _collect(
        bench_kernels(loaded, run, timer, decode_step(chain=True), batches=batches, context=context, repeats=repeats)
    )
    if len(batches) == 1:
        columns = ("calls", "us", "us_per_step", "bytes", "weight_bytes", "gb_s", "share")
        _print(f"kernels, batch {batches[0]}, context {context:,}, {_about(run)}", rows, columns, ("op", "shape"))
    else:
        columns, lines = by_batch(rows)
        title = f"us and share of copy bandwidth by batch, context {context:,}, {_about(run)}"
        report.console().print(report.table(title, lines, ("weight_bytes", "over_5_MB", *columns), ("op", "shape")))
    put(verdict(rows), end="\n")
    output.write("kernels", rows, report.OP_COLUMNS)
    put(report.json_line("kernels", rows), end="\n")


def draw(
    csv: Annotated[Path, typer.Argument(help="A CSV that dsv4 bench decode wrote.")],
    out: Annotated[Path | None, typer.Option(help="The picture.", show_default="beside the CSV, as .svg")] = None,
) -> None:
    """Draw the share of copy bandwidth over the batch, as SVG."""
    target = out or csv.with_suffix(".svg")
    plot(csv, target)
    put(str(target), end="\n")


bench.command()(decode)
bench.command()(prefill)
bench.command()(kernels)
bench.command("plot")(draw)


def make_timer(device: str) -> Timer:
    """The clock of this machine's GPU, or CPU where that is the device. Raises KernelError without a GPU."""
    return ClockTimer() if device == "cpu" else CudaTimer()


def decode_step(*, chain: bool) -> MakeStep:
    """How a decode step is made. chain: never with all layers at once."""
    from dsv4.engine.step import DecodeStep

    def make(model: Model, cache: KVCache, rows: int, longest: int) -> DecodeStep:
        return DecodeStep(model, cache, rows, max_length=longest, persistent=False if chain else None)

    return make


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise typer.BadParameter(f"{text!r}; give whole numbers of 1 or more joined by commas", param_hint=option)
    return numbers


def _open(name: str, load: LoadOptions, *, graphs: bool = True) -> tuple[Timer, Model, Stored, report.Run]:
    """Everything is checked, and the copy measured, before the model takes the memory. graphs: they are timed, which
    only a GPU has.
    """
    tp = load.ranks()
    timer = make_timer(load.device)
    if graphs and isinstance(timer, ClockTimer):
        raise RequestError("dsv4 bench decode and kernels measure the GPU, not device 'cpu'; leave --device out")
    if isinstance(timer, CudaTimer):
        if torch.device(load.device).type != "cuda":
            raise RequestError(f"dsv4 bench measures the GPU, not device {load.device!r}; leave --device out")
        if tp is None:
            torch.cuda.set_device(torch.device(load.device).index or 0)
    copied = round(timer.copy_gb_s(), 1)
    note(f"{timer.name()}: copies {copied:,.0f} GB/s, read and written")
    stored = stored_bytes(name, load.weights, load.layers, Share() if tp is None else tp.share)
    model = load.load(name)
    layers = len(model.config.layers)
    commit, typed = report.this_commit(), report.this_command()
    run = report.Run(name, layers, load.tp, load.act, timer.name(), copied, commit, typed, load.experts)
    return timer, model, stored, run


def _about(run: report.Run) -> str:
    ranks = f", {run.ranks} ranks" if run.tp > 1 else ""
    return f"{run.model}, {run.layers} layers{ranks}, act={run.act}; {run.gpu}, copy {run.copy_gb_s:,.0f} GB/s"


def _collect(rows: Iterable[report.Row]) -> list[report.Row]:
    """All rows, each announced as it comes."""
    found = []
    for row in rows:
        found.append(row)
        shown: dict[str, Any] = {**row.values, **row.more}
        words = ("op", "shape", "batch", "context", "us_per_step", "gb_s", "share")
        note("  ".join(f"{key} {report.text(key, shown[key])}" for key in words if key in shown))
    return found


def _print(title: str, rows: Sequence[report.Row], right: Sequence[str], left: Sequence[str] = ()) -> None:
    report.console().print(report.table(title, [{**row.values, **row.more} for row in rows], right, left))
