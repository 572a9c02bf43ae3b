"""`dsv4 check decode`: the certificate of a quiet decode step."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dsv4.cli.console import note, put_json, speaks
from dsv4.cli.options import EMBEDDED
from dsv4.cli.ranks import start
from dsv4.engine.guard import cupti
from dsv4.engine.guard.certificate import certify
from dsv4.engine.guard.decode import Decode
from dsv4.engine.guard.driver import driver
from dsv4.engine.guard.findings import BatchReport, Report
from dsv4.engine.guard.step import Subject
from dsv4.errors import KernelError, RequestError
from dsv4.model import load
from dsv4.parallel.mesh import Experts, Mesh


def decode(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Checkpoint folder, nano, random:flash or random:pro.")
    ] = EMBEDDED,
    layers: Annotated[int | None, typer.Option(help="Of random:flash and random:pro, the first so many.")] = None,
    batch: Annotated[str, typer.Option(help="Batch buckets to check, with commas.")] = "1,4,64",
    act: Annotated[Literal["bf16", "fp8", "nvfp4"], typer.Option(help="Inputs of linears.")] = "bf16",
    weights: Annotated[Literal["native", "nvfp4"], typer.Option(help="As stored, or requantised at load.")] = "native",
    tp: Annotated[int, typer.Option(help="Share the model among so many processes, each on a GPU of its own.")] = 1,
    experts: Annotated[Experts, typer.Option(help="With --tp: some of each routed expert, or some of them.")] = "tp",
    inventory: Annotated[bool, typer.Option("--inventory", help="Also list kernels and lines of the graphs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON document to this file.")] = None,
) -> None:
    """Prove that a decode step is one graph launch and nothing else, on every thread (with --tp, of every rank).

    Records every CUDA call of the step (CUPTI) and every allocation of torch; reads the captured graph; captures the
    step at several lengths, which must give the same graph; compares replay with eager bit for bit at the edges of the
    cache's layout, with padding rows and poisoned memory. Exits with 1 when anything is found that no allow() names.
    """
    rows, mesh = parse_batches(batch), start(tp, "cuda", experts)
    if not torch.cuda.is_available():
        raise KernelError("the certificate is of a GPU's step, and torch sees no CUDA GPU")
    settings = {"layers": layers, "act": act, "weights": weights}
    subject = open_subject(max(rows), model, mesh, **settings)
    about = {"model": model, **settings, "tp": tp, "experts": experts}
    report = Report({**about, **software(), "command": shown_command(sys.argv)})
    for count in rows:
        report.batches.append(certify(subject, count, say=note))
    if as_json:
        put_json(report.as_json())
    else:
        show(report, inventory)
    if out is not None and speaks():
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report.as_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    refused = sum(finding.count for part in report.batches for finding in part.refused)
    note("clean: the step is quiet" if report.clean else f"{refused} findings: the step is not quiet")
    if refused and mesh is not None and mesh.rank:
        lines = [f.line() for part in report.batches for f in part.refused]
        raise KernelError("\n".join([f"{refused} findings: the step is not quiet", *lines]))
    raise typer.Exit(report.exit_status)


def open_subject(most_rows: int, model: str, tp: Mesh | None = None, **settings: Any) -> Subject:
    """The model's decode step on this GPU, or this rank's part of it."""
    return Decode(load(model, device="cuda", tp=tp, **settings), most_rows)


def parse_batches(text: str) -> list[int]:
    """ "1,4,64" -> [1, 4, 64]. RequestError for anything else."""
    try:
        rows = [int(part) for part in text.split(",")]
    except ValueError:
        rows = []
    if not rows or min(rows) < 1:
        raise RequestError(f"--batch takes numbers of rows with commas, as 1,4,64; got {text!r}")
    return rows


def software() -> dict[str, Any]:
    """What the certificate holds for: this GPU with these versions."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "driver_cuda": driver().version(),
        "cupti": cupti.cupti().version(),
    }


def shown_command(arguments: list[str]) -> str:
    return " ".join(["dsv4", *arguments[1:]])


def show(report: Report, inventory: bool) -> None:
    """A line per batch bucket, then every finding with its line of Python."""
    console = Console(soft_wrap=True, highlight=False)
    table = Table("batch", "graph launches", "calls", "graph nodes", "kernels", "lengths", box=SIMPLE_HEAD)
    table.add_column("compared", justify="right")
    table.add_column("findings", justify="right")
    for part in report.batches:
        table.add_row(*summary(part))
    console.print(table)
    for part in report.batches:
        for finding in part.findings:
            state = f"allowed ({finding.allowed})" if finding.allowed is not None else "found"
            console.print(f"batch {part.rows}: {state}: [{finding.check}] {finding.line()}", markup=False)
        for line in part.allowed:
            console.print(f"batch {part.rows}: allow: {line}", markup=False)
        for line in part.notes:
            console.print(f"batch {part.rows}: note: {line}", markup=False)
        if inventory:
            for title, counts in (
                ("stage", part.stage_calls),
                ("call", part.calls),
                ("kernel", part.kernels),
                ("line", part.lines),
            ):
                for name, count in counts.items():
                    console.print(f"batch {part.rows}: {title} {count:6d}  {name}", markup=False)


def summary(part: BatchReport) -> list[str]:
    steps = len(part.graph_launches)
    return [
        str(part.rows),
        f"{sum(part.graph_launches)} in {steps} steps" if steps else "-",
        ", ".join(f"{count} {name}" for name, count in part.calls.items()) or "-",
        ", ".join(f"{count} {name}" for name, count in part.nodes.items()) or "-",
        str(sum(part.kernels.values())),
        str(len(part.scalars) + 1 if part.scalars else 0),
        str(len(part.compared)),
        str(sum(finding.count for finding in part.refused)),
    ]
