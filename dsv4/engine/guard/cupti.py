"""CUPTI's callback API through ctypes: a listener is called at the entry and exit of every CUDA call of this process,
on the thread that makes it, whichever library makes it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterator
from ctypes import POINTER, byref, c_char_p, c_int, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import torch

from dsv4.errors import KernelError

DRIVER, RUNTIME, RESOURCE, SYNCHRONIZE = 1, 2, 3, 4  # CUPTI_CB_DOMAIN_*
MODULE_LOADED, NODE_CREATED = 6, 13  # CUPTI_CBID_RESOURCE_*
ENTER = 0  # CUPTI_API_ENTER
_CALLBACK = ctypes.CFUNCTYPE(None, c_void_p, c_int, c_uint32, c_void_p)
_BUSY = 39  # CUPTI_ERROR_MULTIPLE_SUBSCRIBERS_NOT_SUPPORTED
_GAP = 8  # unused ids in a row that end a domain's list of names

Listener = Callable[[int, int, int], None]  # domain, callback id, address of the callback's data


def candidates() -> Iterator[Path]:
    """Where libcupti may be, best first: named by DSV4_CUPTI, loaded already, beside torch, in the toolkit."""
    named = os.environ.get("DSV4_CUPTI")
    if named:
        yield Path(named)
        return
    try:
        mapped = re.findall(r"\s(/\S*libcupti\.so\S*)$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    except OSError:
        mapped = []
    yield from map(Path, mapped)
    major = (torch.version.cuda or "").split(".")[0]
    names = [f"libcupti.so.{major}", "libcupti.so"] if major else ["libcupti.so"]
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(place) for place in (spec.submodule_search_locations or [])] if spec is not None else []
    folders = [root / folder / "lib" for root in roots for folder in (f"cu{major}", "cuda_cupti")]
    nvcc = shutil.which("nvcc")
    for toolkit in filter(None, [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc, "/usr/local/cuda"]):
        base = Path(toolkit).resolve().parent.parent if toolkit == nvcc else Path(toolkit)
        folders += [base / "extras/CUPTI/lib64", base / "lib64", base / "lib", base / "targets/x86_64-linux/lib"]
    yield from (folder / name for folder in folders for name in names)


def find() -> Path:
    """libcupti's file. KernelError lists where it was looked for."""
    looked = list(dict.fromkeys(candidates()))
    for path in looked:
        if path.is_file():
            return path
    raise KernelError(
        "the certificate needs CUPTI (libcupti), which sees every CUDA call, and found none; install the package "
        "nvidia-cuda-cupti of torch's CUDA version, or set DSV4_CUPTI to the file. Looked for: "
        + ", ".join(map(str, looked))
    )


class Cupti:
    """libcupti with the functions the guard uses."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._library = ctypes.CDLL(str(path))
            self._functions: dict[str, Any] = {}  # library[name] makes a new object each time, without the types
            self._function("cuptiGetVersion", POINTER(c_uint32))
            self._function("cuptiGetResultString", c_int, POINTER(c_char_p))
            self._function("cuptiGetCallbackName", c_int, c_uint32, POINTER(c_char_p))
            self._function("cuptiSubscribe", POINTER(c_void_p), _CALLBACK, c_void_p)
            self._function("cuptiUnsubscribe", c_void_p)
            self._function("cuptiEnableDomain", c_uint32, c_void_p, c_int)
            self._function("cuptiEnableCallback", c_uint32, c_void_p, c_int, c_uint32)
        except (OSError, AttributeError) as error:
            raise KernelError(f"{path} cannot serve as CUPTI: {error}") from error
        self.names = {domain: self._names(domain) for domain in (DRIVER, RUNTIME)}

    def _function(self, name: str, *types: Any) -> None:
        function = self._functions[name] = self._library[name]
        function.argtypes, function.restype = types, c_int

    def _names(self, domain: int) -> dict[int, str]:
        """Callback id -> function name, as this library numbers them."""
        names: dict[int, str] = {}
        last, cbid = 0, 0
        while cbid - last < _GAP:
            cbid += 1
            text = c_char_p()
            if self._functions["cuptiGetCallbackName"](domain, cbid, byref(text)) == 0 and text.value:
                names[cbid], last = text.value.decode(), cbid
        return names

    def version(self) -> int:
        value = c_uint32()
        self.check("cuptiGetVersion", byref(value))
        return value.value

    def check(self, name: str, *arguments: Any) -> None:
        code = self._functions[name](*arguments)
        if code:
            text = c_char_p()
            self._functions["cuptiGetResultString"](code, byref(text))
            said = text.value.decode() if text.value else f"CUptiResult {code}"
            hint = "; another profiler holds CUPTI in this process: run without it" if code == _BUSY else ""
            raise KernelError(f"{name} failed: {said}{hint} ({self.path})")


class Subscription:
    """From `start` to `stop` the listener sees every call. What it raises is kept in `errors`, not thrown into CUDA."""

    def __init__(self, cupti: Cupti, listener: Listener):
        self.cupti, self.errors = cupti, list[BaseException]()

        def call(_user: int | None, domain: int, cbid: int, data: int | None) -> None:
            try:
                listener(domain, cbid, data or 0)
            except BaseException as error:
                self.errors.append(error)

        self._callback = _CALLBACK(call)  # kept alive: CUPTI holds its address
        self._handle = c_void_p()

    def start(self) -> None:
        self.cupti.check("cuptiSubscribe", byref(self._handle), self._callback, None)
        try:
            for domain in (DRIVER, RUNTIME, SYNCHRONIZE):
                self.cupti.check("cuptiEnableDomain", 1, self._handle, domain)
            for cbid in (MODULE_LOADED, NODE_CREATED):
                self.cupti.check("cuptiEnableCallback", 1, self._handle, RESOURCE, cbid)
        except KernelError:
            self.stop()
            raise

    def stop(self) -> None:
        self.cupti.check("cuptiUnsubscribe", self._handle)


@functools.cache
def cupti() -> Cupti:
    """The library, loaded once."""
    return Cupti(find())
