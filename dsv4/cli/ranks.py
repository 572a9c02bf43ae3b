"""`--tp N`: the same command as N processes, of which the first one speaks."""

from __future__ import annotations

import os
import sys
import time

import typer

from dsv4.cli import console
from dsv4.errors import RequestError
from dsv4.parallel.launch import run_ranks
from dsv4.parallel.mesh import Experts, Mesh, is_rank, join

_LATER = 3.0  # seconds: what every rank refuses is said by the first, which ends the others


def start(size: int, device: str, experts: Experts = "tp") -> Mesh | None:
    """None for one process. Of several, this becomes the one that starts the ranks and waits (it does not return), or,
    where torchrun or that one started it, a rank; only rank 0 writes to stdout and notes to stderr.
    """
    if size < 1:
        raise RequestError(f"--tp takes a number of processes of 1 or more, got {size}")
    if size == 1 and experts != "tp":
        raise RequestError(f"--experts {experts} divides experts among processes; give --tp with 2 or more of them")
    if size == 1:
        return None
    if not is_rank():
        raise typer.Exit(run_ranks(size, ["-m", "dsv4.cli", *sys.argv[1:]]))
    mesh = join(size, device, experts)
    if mesh.rank:
        console.silence()
    return mesh


def failed(error: Exception) -> None:
    """Say why this process ends."""
    rank = int(os.environ["RANK"]) if is_rank() else 0
    if rank:
        time.sleep(_LATER)
    console.error(f"rank {rank}: {error}" if rank else str(error))
