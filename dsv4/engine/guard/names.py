"""What a CUDA API call does to a quiet step, told from its name: callback numbers change by release."""

from __future__ import annotations

import re
from typing import Literal

Kind = Literal[
    "graph launch",
    "kernel",
    "host function",
    "sync",
    "copy",
    "memset",
    "alloc",
    "free",
    "load",
    "graph change",
    "other",
]

# A call of these kinds is a finding by itself; whether a copy is one follows from its form and its operands.
LOUD: frozenset[Kind] = frozenset(
    ("kernel", "host function", "sync", "memset", "alloc", "free", "load", "graph change")
)
_VERSION = re.compile(r"_(?:v\d+|ptsz|ptds)$")  # ABI version; per-thread default stream
_PREFIX = re.compile(r"^_*(?:cuda|cu64|cu)")
_RULES: tuple[tuple[Kind, str], ...] = (
    ("graph launch", r"GraphLaunch$"),
    ("kernel", r"Launch(Grid|GridAsync)?$|Launch(Cooperative)?Kernel"),
    ("host function", r"LaunchHostFunc$|StreamAddCallback$"),
    ("sync", r"(Device|Thread|Stream|Event|Ctx)Synchronize$"),
    ("copy", r"Memcpy(?!Node)"),
    ("memset", r"Memset(?!Node)"),
    (
        "alloc",
        r"Malloc|HostAlloc$|MemAlloc|MemHostAlloc$|MemCreate$|MemMap(ArrayAsync)?$|MemAddressReserve$|MemSetAccess$"
        r"|(Mipmapped)?Array(3D)?Create$|MemPoolCreate$|(Mem)?HostRegister$|IpcOpenMemHandle$|ImportExternalMemory$"
        r"|MemImportFromShareableHandle$|Multicast(Create|Bind\w+)$",
    ),
    (
        "free",
        r"Free(Async|Host|Array|MipmappedArray)?$|MemFree|MemRelease$|MemUnmap$|MemAddressFree$|MemPoolTrimTo$"
        r"|(Mipmapped)?ArrayDestroy$|MemPoolDestroy$|(Mem)?HostUnregister$|IpcCloseMemHandle$|DeviceGraphMemTrim$"
        r"|DestroyExternalMemory$|MulticastUnbind$",
    ),
    (
        "load",
        r"Module(Load|Unload)|Library(Load|Unload)|Link(Create|AddData|AddFile|Complete)$|FuncLoad$|CompilePtx$"
        r"|RegisterFatBinary$",
    ),
    (
        "graph change",
        r"Stream(Begin|End)Capture|Graph(Instantiate|Create|Clone|Upload|Destroy|Add|KernelNodeCopy|Remove)"
        r"|GraphExec(Update|Destroy|\w+SetParams|\w+SetEvent)|Graph\w*Node\w*Set(Params|Event|Enabled)",
    ),
)


def plain(name: str) -> str:
    """cudaMemcpyAsync_ptsz_v7000 -> cudaMemcpyAsync, __cudaLaunchKernel_v13000 -> cudaLaunchKernel."""
    name = name.lstrip("_")
    while (shorter := _VERSION.sub("", name)) != name:
        name = shorter
    return name


def kind_of(name: str) -> Kind:
    """The kind of a runtime or driver API function, from its name with or without version suffixes."""
    stem = _PREFIX.sub("", plain(name))
    return next((kind for kind, pattern in _RULES if re.match(pattern, stem)), "other")


def blocks(name: str) -> bool:
    """Is this copy one of the forms that return when the copy is done?"""
    name = plain(name)
    return kind_of(name) == "copy" and not name.endswith("Async")
