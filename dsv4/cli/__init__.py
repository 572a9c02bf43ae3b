"""The command line: `dsv4 COMMAND`, one module per command."""

from __future__ import annotations

import sys

import typer

from dsv4.cli import ranks
from dsv4.cli.bench import bench
from dsv4.cli.chat import chat
from dsv4.cli.check import check
from dsv4.cli.compare import compare
from dsv4.cli.eval import evaluate
from dsv4.cli.generate import generate
from dsv4.cli.inspect import inspect
from dsv4.cli.kernels import kernels
from dsv4.cli.quantize import quantize
from dsv4.errors import Dsv4Error

app = typer.Typer(
    name="dsv4",
    help="DeepSeek-V4 from NVFP4 weights. Without a model, commands use the small embedded one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.command()(chat)
app.command("eval")(evaluate)
app.command()(compare)
app.command()(inspect)
app.command()(quantize)
app.add_typer(check, name="check")
app.add_typer(kernels, name="kernels")
app.add_typer(bench, name="bench")


def main(args: list[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 a Dsv4Error (one line on stderr), 2 wrong usage, 130 interrupted."""
    try:
        app(args, prog_name="dsv4")
    except Dsv4Error as error:
        ranks.failed(error)
        sys.exit(1)
