"""All cases: those of every op that has a kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module

import torch

from dsv4.kernels.case import Case, Maker
from dsv4.kernels.compiler import ops_with_kernels


def cases(device: torch.device, ops: Sequence[str] = (), *, quick: bool = False) -> Iterator[Case]:
    """The cases of `ops` (all when empty); `quick` keeps small ones of every path, for tools under which a kernel runs
    a hundred times slower.
    """
    for op in ops or ops_with_kernels():
        yield from import_module(f"dsv4.kernels.{op}.cases").cases(Maker(device), quick)
