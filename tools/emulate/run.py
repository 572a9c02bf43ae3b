"""Launches of dsv4's kernels on this processor, on CPU tensors, through the same launchers as on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels import loader
from dsv4.quant.weights import FP8Weight, NVFP4Weight, PlainWeight
from tools.emulate.build import library_of

libraries: dict[str, ctypes.CDLL] = {}  # by op, as they are needed


@contextmanager
def launched_here(seed: int = 0, ranks: int = 1) -> Iterator[None]:
    """Launches run on this processor, threads in an order that follows from the seed. ranks: how many run side by side
    and meet in each other's memory; the last of them runs all, and raises what goes wrong.
    """

    def call(kernel: loader.Kernel, device: torch.device, *arguments: Any) -> None:
        if (notes := loader._notes.get()) is not None:
            notes.append(loader.Launch(kernel.op, kernel.letters, arguments))
            return
        if kernel.op not in libraries:
            libraries[kernel.op] = library_of(kernel.op)
        library = libraries[kernel.op]
        launcher, error_text = loader.bind(library, kernel.op, kernel.types, kernel.part)
        library["emulate_as"](ctypes.c_uint64(seed), ranks)
        values = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
        if code := launcher(*values, None):
            raise KernelError(f"op '{kernel.op}': {error_text(code).decode()}")

    with patch.object(loader.Kernel, "__call__", call):
        yield


@contextmanager
def weights_as_on_a_gpu() -> Iterator[None]:
    """Operands that are made meanwhile have the form that kernels read."""
    gpu = property(lambda self: SimpleNamespace(type="cuda"))
    with ExitStack() as stack:
        for form in (NVFP4Weight, FP8Weight, PlainWeight):
            stack.enter_context(patch.object(form, "device", gpu))
        yield
