"""The few functions of libcuda that the guard calls itself: graphs, kernel names and parameters, kinds of memory."""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint64, c_void_p
from typing import Any, Literal

from dsv4.engine.guard.structs import Copy3D, KernelNode, Memset
from dsv4.errors import KernelError

Memory = Literal["device", "pinned", "pageable", "managed"]
INVALID_VALUE = 1  # CUDA_ERROR_INVALID_VALUE
_MEMORY_TYPE, _IS_MANAGED = 2, 8  # CU_POINTER_ATTRIBUTE_*
_HOST = 1  # CU_MEMORYTYPE_HOST

# Name in libcuda -> argument types. Every function returns CUresult.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGraphGetNodes": (c_void_p, c_void_p, POINTER(c_size_t)),
    "cuGraphNodeGetType": (c_void_p, POINTER(c_int)),
    "cuGraphKernelNodeGetParams_v2": (c_void_p, POINTER(KernelNode)),
    "cuGraphMemcpyNodeGetParams": (c_void_p, POINTER(Copy3D)),
    "cuGraphMemsetNodeGetParams": (c_void_p, POINTER(Memset)),
    "cuGraphChildGraphNodeGetGraph": (c_void_p, POINTER(c_void_p)),
    "cuFuncGetName": (POINTER(c_char_p), c_void_p),
    "cuKernelGetName": (POINTER(c_char_p), c_void_p),
    "cuFuncGetParamInfo": (c_void_p, c_size_t, POINTER(c_size_t), POINTER(c_size_t)),
    "cuKernelGetParamInfo": (c_void_p, c_size_t, POINTER(c_size_t), POINTER(c_size_t)),
    "cuPointerGetAttribute": (c_void_p, c_int, c_uint64),
    "cuMemsetD8_v2": (c_uint64, c_ubyte, c_size_t),
}


class Driver:
    """libcuda, each function with its types. KernelError names a function that the driver lacks or that failed."""

    def __init__(self, path: str = "libcuda.so.1"):
        try:
            library = ctypes.CDLL(path)
        except OSError as error:
            raise KernelError(f"the guard needs the CUDA driver, and {path} cannot be loaded: {error}") from error
        self._functions: dict[str, Any] = {}  # library[name] makes a new object each time, without the types
        for name, types in _FUNCTIONS.items():
            try:
                function = self._functions[name] = library[name]
            except AttributeError as error:
                raise KernelError(
                    f"{path} has no {name}: the guard reads captured graphs through it and needs a driver for CUDA "
                    "12.4 or newer"
                ) from error
            function.argtypes, function.restype = types, c_int

    def call(self, name: str, *arguments: Any) -> None:
        code = self._functions[name](*arguments)
        if code:
            raise KernelError(f"{name} failed: {self.error_name(code)}")

    def code(self, name: str, *arguments: Any) -> int:
        """The CUresult, for callers to whom an error is an answer."""
        return int(self._functions[name](*arguments))

    def error_name(self, code: int) -> str:
        text = c_char_p()
        self._functions["cuGetErrorName"](code, byref(text))
        return text.value.decode() if text.value else f"CUresult {code}"

    def version(self) -> int:
        value = c_int()
        self.call("cuDriverGetVersion", byref(value))
        return value.value

    def memory(self, address: int) -> Memory:
        """Whose memory this is. Host memory that CUDA does not know is pageable."""
        kind, managed = c_int(), c_int()
        code = self.code("cuPointerGetAttribute", byref(kind), _MEMORY_TYPE, address)
        if code == INVALID_VALUE:
            return "pageable"
        if code:
            raise KernelError(f"cuPointerGetAttribute failed: {self.error_name(code)}")
        if not self.code("cuPointerGetAttribute", byref(managed), _IS_MANAGED, address) and managed.value:
            return "managed"
        return "pinned" if kind.value == _HOST else "device"

    def fill(self, address: int, byte: int, size: int) -> None:
        """Overwrite device memory. Asynchronous: synchronise before anything on another stream relies on it."""
        self.call("cuMemsetD8_v2", address, byte, size)


@functools.cache
def driver() -> Driver:
    return Driver()
