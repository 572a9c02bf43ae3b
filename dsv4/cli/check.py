"""`dsv4 check`: is what runs here what the definition says?"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from dsv4.cli.check_decode import decode
from dsv4.cli.console import note, put, put_json

check = typer.Typer(help="Compare what runs here with its definition.", no_args_is_help=True)


@check.callback()
def _group() -> None:
    """Compare what runs here with its definition."""


check.command("decode")(decode)


@check.command("kernels")
def kernels(
    op: Annotated[list[str] | None, typer.Option(help="Check this op only; may be repeated.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small cases only, no timing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Run every CUDA kernel against its PyTorch twin on this machine's GPU.

    Outputs are poisoned and lie between guard bytes. Times are of launches in a CUDA graph, operands warm in L2. Exits
    with 1 when a case fails.
    """
    import torch

    from dsv4.kernels.check import Row, check_kernels
    from dsv4.kernels.loader import arch_of, mode

    rows: list[Row] = []
    for row in check_kernels(op or (), quick=quick):
        rows.append(row)
        if not as_json:
            if len(rows) == 1:
                figures = f"{'error':>9} {'bound':>9} {'equal':>7} {'us':>8} {'GB/s':>7}"
                put(f"{'op':<12} {'case':<30} {'dtype':<5} {figures}", end="\n")
            speed = f"{row.us:8.2f} {row.gb_s:7.0f}" if row.us is not None else f"{'-':>8} {'-':>7}"
            put(
                f"{row.op:<12} {row.case:<30} {row.dtype:<5} {row.max_error:9.2e} {row.bound:9.2e} "
                f"{row.equal:7.2%} {speed} {row.finding or ''}".rstrip(),
                end="\n",
            )
    failed = sum(not row.ok for row in rows)
    if as_json:
        about = {"gpu": torch.cuda.get_device_name(), "arch": arch_of(torch.device("cuda")), "mode": mode()}
        software = {"torch": torch.__version__, "failed": failed}
        put_json({**about, **software, "rows": [{**_finite(asdict(row)), "ok": row.ok} for row in rows]})
    note(f"{len(rows) - failed} of {len(rows)} cases agree with the twin")
    if failed:
        raise typer.Exit(1)


def _finite(document: dict[str, object]) -> dict[str, object]:
    """JSON has no infinity: a NaN's error is told by the finding."""
    return {key: None if value in (float("inf"), float("-inf")) else value for key, value in document.items()}
