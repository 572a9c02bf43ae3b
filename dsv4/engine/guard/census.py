"""What a captured graph holds: its nodes, read through libcuda from the raw graph that torch keeps."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from dataclasses import dataclass, replace

import torch

from dsv4.engine.guard.calls import CallLog
from dsv4.engine.guard.copies import of_copy
from dsv4.engine.guard.driver import INVALID_VALUE, Driver, driver
from dsv4.engine.guard.findings import Finding
from dsv4.engine.guard.structs import Copy3D, KernelNode, Memset
from dsv4.engine.guard.where import Where
from dsv4.errors import KernelError

# CUgraphNodeType
TYPES = (
    "kernel", "memcpy", "memset", "host", "child graph", "empty", "event wait", "event record", "semaphore signal",
    "semaphore wait", "mem alloc", "mem free", "batch mem op", "conditional",
)  # fmt: skip
_LOUD = {
    "host": ("host function", "a host node: the device waits for the CPU"),
    "mem alloc": ("alloc", "a memory allocation node"),
    "mem free": ("free", "a memory free node"),
    "conditional": ("graph", "a conditional node, whose body the census does not read"),
}
# Node type -> kind of the call that makes it when it is captured
_CALLS = {
    "kernel": "kernel", "memcpy": "copy", "memset": "memset", "host": "host function", "mem alloc": "alloc",
    "mem free": "free",
}  # fmt: skip
_POINTER, _SIZE = 1, 2  # CU_LAUNCH_PARAM_BUFFER_POINTER, CU_LAUNCH_PARAM_BUFFER_SIZE
_MOST_PARAMETERS = 4096


@dataclass(frozen=True)
class Node:
    """A node of a graph. `parameters`: of a kernel its arguments' bytes by index; of a copy or memset each number by
    name. `memory`: whose memory a copy's addresses are.
    """

    type: str
    name: str = ""  # of the kernel, demangled
    launch: tuple[int, ...] = ()  # grid x y z, block x y z, dynamic shared bytes
    parameters: tuple[tuple[str, bytes], ...] = ()
    memory: tuple[str, ...] = ()
    where: Where | None = None
    allowed: str | None = None


def read(graph: torch.cuda.CUDAGraph, log: CallLog | None = None) -> list[Node]:
    """The nodes of a graph captured with keep_graph=True, those of child graphs in their place. `log` is of the capture
    and gives the nodes their Python lines.
    """
    try:
        raw = graph.raw_cuda_graph()
    except RuntimeError as error:
        raise KernelError(
            "the graph's nodes cannot be read: capture it into torch.cuda.CUDAGraph(keep_graph=True)"
        ) from error
    found = list(_nodes(driver(), int(raw)))
    return located(found, log) if log is not None else [node for _, node in found]


def located(found: list[tuple[int, Node]], log: CallLog) -> list[Node]:
    """(handle, node) with lines: by handle where CUPTI announced the nodes, else by the order of the calls that were
    captured, if that gives the very same kinds; no guess otherwise.
    """
    nodes = [node for _, node in found]
    if any(handle in log.nodes for handle, _ in found):
        places = [log.nodes.get(handle, (None, None)) for handle, _ in found]
    elif [_CALLS.get(node.type) for node in nodes] == [call.kind for call in log.captured]:
        places = [(call.where, call.allowed) for call in log.captured]
    else:
        return nodes
    return [replace(node, where=where, allowed=why) for node, (where, why) in zip(nodes, places, strict=True)]


def findings(nodes: list[Node]) -> list[Finding]:
    """Nodes that a quiet graph does not hold: host work, allocations, copies from or to pageable memory."""
    found = []
    for node in nodes:
        kind, what = _LOUD.get(node.type, ("", ""))
        if node.type == "memcpy" and "pageable" in node.memory:
            kind, what = "pageable copy", "a copy node from or to host memory that is not pinned"
        elif node.type.startswith("type "):
            kind, what = "graph", f"a node of {node.type}, which this census does not know"
        if kind:
            found.append(Finding("graph", kind, what, node.where, allowed=node.allowed))
    return found


def _nodes(cuda: Driver, graph: int) -> Iterator[tuple[int, Node]]:
    count = c_size_t()
    cuda.call("cuGraphGetNodes", graph, None, byref(count))
    handles = (c_void_p * count.value)()
    if count.value:
        cuda.call("cuGraphGetNodes", graph, handles, byref(count))
    for handle in handles:
        code = c_int()
        cuda.call("cuGraphNodeGetType", handle, byref(code))
        kind = TYPES[code.value] if 0 <= code.value < len(TYPES) else f"type {code.value}"
        if kind == "child graph":
            child = c_void_p()
            cuda.call("cuGraphChildGraphNodeGetGraph", handle, byref(child))
            yield from _nodes(cuda, child.value or 0)
            continue
        reader = {"kernel": _kernel, "memcpy": _copy, "memset": _memset}.get(kind)
        yield handle or 0, reader(cuda, handle or 0) if reader is not None else Node(kind)


def _kernel(cuda: Driver, handle: int) -> Node:
    node, text = KernelNode(), c_char_p()
    cuda.call("cuGraphKernelNodeGetParams_v2", handle, byref(node))
    function, named = (node.func, "cuFuncGetName") if node.func else (node.kern, "cuKernelGetName")
    code = cuda.code(named, byref(text), function)
    name = demangled(text.value.decode()) if code == 0 and text.value else "?"
    launch = (*node.grid, *node.block, node.shared_bytes)
    query = "cuFuncGetParamInfo" if node.func else "cuKernelGetParamInfo"
    return Node("kernel", name, launch, tuple(_arguments(cuda, query, function, node, name)))


def _arguments(cuda: Driver, query: str, function: int, node: KernelNode, name: str) -> Iterator[tuple[str, bytes]]:
    packed = _packed(node)
    for index in range(_MOST_PARAMETERS):
        offset, size = c_size_t(), c_size_t()
        code = cuda.code(query, function, index, byref(offset), byref(size))
        if code == INVALID_VALUE:  # there is no such parameter
            return
        if code:
            raise KernelError(f"{query} failed for {name}: {cuda.error_name(code)}")
        if node.params:
            yield f"argument {index}", ctypes.string_at(node.params[index], size.value)
        elif packed is not None:
            yield f"argument {index}", packed[offset.value : offset.value + size.value]


def _packed(node: KernelNode) -> bytes | None:
    """Arguments given as one buffer."""
    if not node.extra:
        return None
    buffer, size = None, 0
    for i in range(0, 8, 2):
        if node.extra[i] == _POINTER:
            buffer = node.extra[i + 1]
        elif node.extra[i] == _SIZE:
            size = c_size_t.from_address(node.extra[i + 1]).value
        else:
            break
    return ctypes.string_at(buffer, size) if buffer else None


def _copy(cuda: Driver, handle: int) -> Node:
    copy = Copy3D()
    cuda.call("cuGraphMemcpyNodeGetParams", handle, byref(copy))
    memory = tuple(cuda.memory(address) for address in of_copy(copy).addresses)
    return Node("memcpy", parameters=_fields(copy), memory=memory)


def _memset(cuda: Driver, handle: int) -> Node:
    memset = Memset()
    cuda.call("cuGraphMemsetNodeGetParams", handle, byref(memset))
    return Node("memset", parameters=_fields(memset))


def _fields(struct: Copy3D | Memset) -> tuple[tuple[str, bytes], ...]:
    raw, fields = bytes(struct), type(struct)
    return tuple((name, raw[(f := getattr(fields, name)).offset : f.offset + f.size]) for name, *_ in fields._fields_)


@functools.cache
def demangled(name: str) -> str:
    """A C++ symbol as it was written, without its argument list; the name itself where nothing can demangle it."""
    try:
        library = ctypes.CDLL("libstdc++.so.6")
        demangle, free = library["__cxa_demangle"], ctypes.CDLL(None)["free"]
    except (OSError, AttributeError):
        return name
    demangle.restype, free.argtypes = c_void_p, [c_void_p]
    demangle.argtypes = [c_char_p, c_void_p, c_void_p, c_void_p]
    text = demangle(name.encode(), None, None, None)
    if not text:
        return name
    written = ctypes.string_at(text).decode()
    free(text)
    return shortened(written)


def shortened(written: str) -> str:
    """`void a::k<int, (T)1>(float*)` -> `a::k<int, (T)1>`."""
    depth, end = 0, len(written)
    for i in range(len(written) - 1, -1, -1):  # the last parenthesis opened at depth 0 opens the argument list
        depth += {")": 1, "(": -1}.get(written[i], 0)
        if written[i] == "(" and depth == 0:
            end = i
            break
    return written[:end].removeprefix("void ").strip()
