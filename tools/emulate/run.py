"""Kernels of dsv4 on this processor: launches of `Kernel` go to emulated libraries, and programs of decode_layers run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels import loader
from dsv4.kernels.case import Maker
from dsv4.kernels.check import flat
from dsv4.kernels.decode_layers.cases import Small
from dsv4.kernels.decode_layers.decode_layers import decode_layers
from dsv4.kernels.decode_layers.phases import Linear
from dsv4.kernels.decode_layers.program import make_tables
from dsv4.quant.weights import FP8Weight, NVFP4Weight, PlainWeight
from tools.emulate.build import library

CPU = torch.device("cpu")
SHARED_BYTES = 231424  # of a block, as an H200 has them
_libraries: dict[str, Any] = {}


@contextmanager
def launched_here(seed: int = 0) -> Iterator[None]:
    """Launches run on this processor, threads in an order that follows from the seed."""

    def call(kernel: loader.Kernel, device: torch.device, *arguments: Any) -> None:
        notes = loader._notes.get()
        if notes is not None:
            notes.append(loader.Launch(kernel.op, kernel.letters, arguments))
            return
        found = _libraries.get(kernel.op) or _libraries.setdefault(kernel.op, library(kernel.op))
        launcher, error_text = loader.bind(found, kernel.op, kernel.types, kernel.part)
        found["emulate_seed"](seed)
        values = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
        if code := launcher(*values, None):
            raise KernelError(f"op '{kernel.op}': {error_text(code).decode()}")

    with patch.object(loader.Kernel, "__call__", call):
        yield


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Operands that are made meanwhile have the form that kernels read."""
    gpu = property(lambda self: SimpleNamespace(type="cuda"))
    with ExitStack() as stack:
        for form in (NVFP4Weight, FP8Weight, PlainWeight):
            stack.enter_context(patch.object(form, "device", gpu))
        yield


def small(rows: int, padding: int, format: str, entries: int = 0) -> Small:
    """Two layers in the form that kernels read; always the same for the same arguments."""
    with as_on_a_gpu():
        return Small(Maker(CPU), rows, padding, format, entries=entries)


def left_by(program: Small, grid: int, seed: int) -> dict[str, Tensor]:
    """All that a launch of the program by `grid` blocks leaves, by the phase that writes it."""
    with launched_here(seed):
        program.program.tables = make_tables(program.program.phases, program.h, grid, SHARED_BYTES)
        inspect.unwrap(decode_layers)(program.h, program.program)
    names = {}
    for place, phase in enumerate(program.phases):
        outs = [x for product in phase.products for x in product.out] if isinstance(phase, Linear) else flat(phase.out)
        for number, x in enumerate(outs):
            names.setdefault(x.data_ptr(), f"{place:02} {type(phase).__name__} result {number}")
    every = [*program.written, program.y]
    order = [names.get(x.data_ptr(), f"state {place:02}") for place, x in enumerate(every)]
    return dict(sorted(zip(order, every, strict=True)))
