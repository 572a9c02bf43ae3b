"""All cases: those of every op that has a kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module

import torch

from dsv4.kernels.case import Case, Maker
from dsv4.kernels.compiler import FOLDER


def ops_with_cases() -> list[str]:
    """Names of the ops whose folder holds cases: all that launch a kernel, their own or another op's."""
    return sorted(path.parent.name for path in FOLDER.glob("*/cases.py"))


def cases(device: torch.device, ops: Sequence[str] = (), *, quick: bool = False) -> Iterator[Case]:
    """The cases of `ops` (all when empty); `quick` keeps small ones of every path, for tools under which a kernel runs
    a hundred times slower.
    """
    for op in ops or ops_with_cases():
        yield from import_module(f"dsv4.kernels.{op}.cases").cases(Maker(device), quick)
