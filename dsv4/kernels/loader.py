"""From an op's name to a launcher that can be called: out of the kernel pack, or compiled once into the cache.

`DSV4_KERNELS` chooses: `auto` (the default) takes the pack where it fits and compiles otherwise; `pack` (production)
never compiles and stops with the op and the command that builds it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels import pack
from dsv4.kernels.cache import cached_library
from dsv4.kernels.compiler import ARCHS, BUILD_COMMAND, symbol

MODES = ("auto", "pack")
_ARGUMENTS = {"p": ctypes.c_void_p, "q": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}
_BY_CAPABILITY = {(9, 0): "sm_90a", (10, 0): "sm_100a", (10, 3): "sm_103a", (12, 0): "sm_120a"}


def mode() -> str:
    value = os.environ.get("DSV4_KERNELS") or "auto"
    if value not in MODES:
        raise KernelError(f"DSV4_KERNELS is '{value}'; expected one of {', '.join(MODES)}")
    return value


def arch_of(device: torch.device) -> str:
    """The target that a GPU runs."""
    capability = torch.cuda.get_device_capability(device)
    arch = _BY_CAPABILITY.get(capability)
    if arch is None:
        raise KernelError(
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}; the kernels "
            f"are built for {', '.join(ARCHS)}. Load the model with device='cpu', or set DSV4_REF=all"
        )
    return arch


def load(op: str, arch: str) -> ctypes.CDLL:
    """The library that holds the op's launcher for `arch`."""
    chosen, folder = mode(), pack.pack_folder()
    reason = pack.missing(pack.read_manifest(folder), op, arch)
    if reason is None:
        return pack.library(folder)
    if chosen == "pack":
        raise KernelError(
            f"op '{op}' has no compiled kernel for {arch} in {folder}: {reason}, and DSV4_KERNELS=pack "
            f"forbids compiling. Build it: {BUILD_COMMAND} --arch {arch} --out {folder}"
        )
    return cached_library(op, arch)


class Launch(NamedTuple):
    """What an op's launcher would have been given, and the letters of its C types."""

    op: str
    letters: str
    arguments: tuple[Any, ...]


_notes: ContextVar[list[Launch] | None] = ContextVar("notes", default=None)


@contextmanager
def noted() -> Iterator[list[Launch]]:
    """Launches made inside are written down instead, tensors as tensors. Needs no GPU."""
    launches: list[Launch] = []
    before = _notes.set(launches)
    try:
        yield launches
    finally:
        _notes.reset(before)


class Kernel:
    """An op's launcher. `arguments` are its C types in order: p pointer, q int64, i int, f float; the stream follows.
    `part` names another function that the op's library exports beside it.

    Loaded at the first launch on a device (a step captured in a graph has run before). A launch goes to torch's current
    stream of that device; an error it returns is raised with the op, the target and CUDA's words.
    """

    def __init__(self, op: str, arguments: str, part: str | None = None):
        self.op, self.letters, self.part = op, arguments, part
        self.types = [_ARGUMENTS[letter] for letter in arguments] + [ctypes.c_void_p]
        self.loaded: dict[int, tuple[Any, Any, str]] = {}

    def __call__(self, device: torch.device, *arguments: Tensor | int | float | None) -> None:
        notes = _notes.get()
        if notes is not None:
            notes.append(Launch(self.op, self.letters, arguments))
            return
        index = torch.cuda.current_device() if device.index is None else device.index
        launcher, error_text, arch = self.loaded.get(index) or self._load(index)
        values = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
        stream = torch.cuda.current_stream(index).cuda_stream
        if index == torch.cuda.current_device():
            code = launcher(*values, stream)
        else:
            with torch.cuda.device(index):
                code = launcher(*values, stream)
        if code:
            raise KernelError(f"op '{self.op}' failed on {arch}: {error_text(code).decode()} (cudaError {code})")

    def ready(self, device: torch.device) -> None:
        """Load it now: what fails here is not what a launch is given."""
        index = torch.cuda.current_device() if device.index is None else device.index
        if index not in self.loaded:
            self._load(index)

    def _load(self, index: int) -> tuple[Any, Any, str]:
        arch = arch_of(torch.device("cuda", index))
        library = load(self.op, arch)
        launcher, error_text = bind(library, self.op, self.types, self.part)
        self.loaded[index] = launcher, error_text, arch
        return self.loaded[index]


def bind(library: ctypes.CDLL, op: str, types: list[Any], part: str | None = None) -> tuple[Any, Any]:
    """The typed launcher (or `part` beside it) and the function that puts its error codes into words."""
    name = symbol(op) if part is None else f"{symbol(op)}_{part}"
    try:
        launcher, error_text = library[name], library["dsv4_error"]
    except AttributeError as error:
        raise KernelError(f"{library._name} does not export {error}; rebuild it: {BUILD_COMMAND}") from error
    launcher.argtypes, launcher.restype = types, ctypes.c_int
    error_text.argtypes, error_text.restype = [ctypes.c_int], ctypes.c_char_p
    return launcher, error_text
