"""The baked-scalar test: a step captured at two lengths must be the same graph, byte for byte.

A length that reached a kernel as a number is in the graph for good: the replay of the next step would still use it.
The step is captured more than once at each length. What differs between captures at one length (struct padding that
nobody wrote, addresses that the allocator chose anew) says nothing about lengths and is left out, and counted. So are
addresses, unless they lie in tensors that live outside the graphs' own memory: what a kernel finds in that memory the
step itself has written, which the comparison of replay and eager checks; and addresses of nothing are what was left on
the stack where an argument has room that its kernel does not use.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from dsv4.engine.guard.census import Node
from dsv4.engine.guard.findings import Finding

_ADDRESSES = range(0x7000_0000_0000, 0x8000_0000_0000)  # where a 64-bit Linux maps libraries, stacks and GPU memory


@dataclass(frozen=True)
class Captures:
    """Captures of one step at one set of lengths; `label` says which."""

    label: str
    graphs: Sequence[list[Node]]


def findings(first: Captures, second: Captures, live: Sequence[range] = ()) -> tuple[list[Finding], int]:
    """What differs between two lengths and not between captures at one length; and how many bytes were left out. live:
    the memory of tensors outside the graphs' own; an address elsewhere proves nothing.
    """
    found: list[Finding] = []
    shapes = [[(node.type, node.name) for node in graph] for captures in (first, second) for graph in captures.graphs]
    if any(shape != shapes[0] for shape in shapes[1:]):
        return [_other_nodes(first, second)], 0
    unstable = 0
    for i, (a, b) in enumerate(zip(first.graphs[0], second.graphs[0], strict=True)):
        repeats = [(c.graphs[0][i], graph[i]) for c in (first, second) for graph in c.graphs[1:]]
        label = a.name or f"{a.type} node"
        if a.launch != b.launch and all(x.launch == y.launch for x, y in repeats):
            found.append(
                _finding(a, f"{label}: launched as {_launch(a)} at {first.label}, {_launch(b)} at {second.label}")
            )
        for p, ((what, x), (_, y)) in enumerate(zip(a.parameters, b.parameters, strict=True)):
            loose = [_differing(n.parameters[p][1], m.parameters[p][1]) for n, m in repeats]
            ignored = set().union(*loose) | _stray_addresses(live, x, y)
            unstable += len(ignored)
            moved = sorted(_differing(x, y) - ignored)
            if moved:
                at = f"{label}: {what}{_offset(moved[0], x)}"
                values = f"{_value(x, moved[0])} at {first.label}, {_value(y, moved[0])} at {second.label}"
                found.append(_finding(a, f"{at} is {values}"))
    return found, unstable


def _stray_addresses(live: Sequence[range], x: bytes, y: bytes) -> set[int]:
    """Bytes of words that differ, look like addresses on both sides and are not both of memory in `live`."""
    found: set[int] = set()
    for at in range(0, min(len(x), len(y)) - 7, 4):
        words = [int.from_bytes(data[at : at + 8], "little") for data in (x, y)]
        addresses = all(word in _ADDRESSES for word in words) and words[0] != words[1]
        if addresses and not all(any(word in piece for piece in live) for word in words):
            found |= {at + i for i in _differing(x[at : at + 8], y[at : at + 8])}
    return found


def _finding(node: Node, what: str) -> Finding:
    return Finding("scalars", "baked", what, node.where, allowed=node.allowed)


def _other_nodes(first: Captures, second: Captures) -> Finding:
    """The graphs do not even hold the same kernels: the first that differs is named."""
    graphs = [(captures.label, graph) for captures in (first, second) for graph in captures.graphs]
    label, reference = graphs[0]
    for other, graph in graphs[1:]:
        for i in range(max(len(reference), len(graph))):
            pair = [g[i] if i < len(g) else Node("nothing") for g in (reference, graph)]
            if (pair[0].type, pair[0].name) != (pair[1].type, pair[1].name):
                names = [f"{node.name or node.type}" for node in pair]
                what = (
                    f"node {i} of {len(reference)} is {names[0]} at {label}, node {i} of {len(graph)} is {names[1]} at "
                    f"{other}: the step launches other kernels"
                )
                node = pair[0] if pair[0].where is not None else pair[1]
                return _finding(node, what)
    raise AssertionError("the graphs are alike")


def _differing(a: bytes, b: bytes) -> set[int]:
    if len(a) != len(b):
        return set(range(max(len(a), len(b))))
    return {i for i in range(len(a)) if a[i] != b[i]} if a != b else set()


def _offset(byte: int, whole: bytes) -> str:
    return "" if len(whole) <= 8 else f" + {byte - byte % 4}"


def _value(data: bytes, byte: int) -> str:
    """The number that holds this byte: all of a small argument, the aligned 4 bytes of a struct."""
    if len(data) > 8:
        data = data[byte - byte % 4 : byte - byte % 4 + 4]
    number = int.from_bytes(data, "little", signed=True)
    if len(data) != 4:
        return hex(number) if number >= 1 << 32 else str(number)
    return f"{number} (as float {struct.unpack('<f', data)[0]:.6g})"


def _launch(node: Node) -> str:
    grid, block = node.launch[:3], node.launch[3:6]
    return f"grid {'x'.join(map(str, grid))} block {'x'.join(map(str, block))} shared {node.launch[6]}"
