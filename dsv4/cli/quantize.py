"""`dsv4 quantize SRC DST`: an NVFP4 checkpoint in ModelOpt's layout from a BF16 or official one."""

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dsv4.checkpoint.pack import Conversion
from dsv4.checkpoint.plan import stack_name
from dsv4.checkpoint.quantize import REPORT_NAME, QuantizeResult, quantize_checkpoint


def quantize(
    source: Annotated[Path, typer.Argument(help="Checkpoint folder to read: BF16, official FP4+FP8, or mixed.")],
    destination: Annotated[Path, typer.Argument(help="New folder to write.")],
    all_linear: Annotated[
        bool, typer.Option("--all-linear", help="Convert attention, shared experts and lm head too, not only experts.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the source and print sizes; write nothing.")
    ] = False,
) -> None:
    """Convert to NVFP4, tensor by tensor, and say of each one whether its values stayed exact.

    MXFP4 experts are recast exactly where their exponents allow it; everything else is rounded anew.
    """
    result = quantize_checkpoint(source, destination, all_linear=all_linear, dry_run=dry_run)
    render(result, Console())


def render(result: QuantizeResult, console: Console) -> None:
    """Print what was converted, with the experts of one projection on one line, and the sizes."""
    if result.conversions:
        console.print(_table(result.conversions))
    kept = ", ".join(f"{count:,} {label}" for label, count in result.kept.items())
    lines = [
        f"{'would convert' if result.dry_run else 'converted'} {len(result.converted):,} weights; kept {kept}",
        f"{result.bytes_before:,} -> {result.bytes_after:,} tensor bytes; {result.free_bytes:,} were free",
        "dry run: nothing was written"
        if result.dry_run
        else f"wrote {result.destination} (every weight by name: {REPORT_NAME})",
    ]
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)


def _table(conversions: list[Conversion]) -> Table:
    stacks: dict[str, list[Conversion]] = {}
    for conversion in conversions:
        stacks.setdefault(stack_name(conversion.name), []).append(conversion)
    table = Table(box=SIMPLE_HEAD)
    table.add_column("weight", no_wrap=True)
    table.add_column("from")
    table.add_column("exact cast", justify="right")
    table.add_column("relative error (largest)", justify="right")
    for name, group in stacks.items():
        exact = sum(conversion.exact for conversion in group)
        said = ("yes" if exact else "no") if len(group) == 1 else f"{exact} of {len(group)}"
        error = max(conversion.error for conversion in group)
        table.add_row(name, "/".join(sorted({c.before for c in group})), said, f"{error:.4f}" if error else "0")
    return table
