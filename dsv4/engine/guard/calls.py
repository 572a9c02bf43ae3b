"""From callbacks to sightings: which calls the threads of this process made, and where each loud one came from."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from dsv4.engine.guard import cupti
from dsv4.engine.guard.allowed import reason_here
from dsv4.engine.guard.copies import Operands, operands
from dsv4.engine.guard.findings import Finding
from dsv4.engine.guard.names import LOUD, Kind, blocks, kind_of, plain
from dsv4.engine.guard.structs import CallbackData, GraphData, ResourceData
from dsv4.engine.guard.where import Where, here

_NODES: frozenset[Kind] = frozenset(("kernel", "copy", "memset", "host function"))  # one graph node each


@dataclass(frozen=True)
class Sighting:
    """One call that may be a finding."""

    kind: Kind
    name: str
    where: Where
    allowed: str | None
    operands: Operands | None = None


class CallLog:
    """Listens to CUPTI. Calls inside calls are folded into the outermost one, which is the one somebody wrote; a loud
    call inside a quiet one (a sync inside a graph launch) is seen.

    No CUDA call is made while listening; the GIL serialises the threads.
    """

    def __init__(self, names: dict[int, dict[int, str]]):
        self._table = {
            (domain, cbid): (plain(name), kind_of(name))
            for domain, known in names.items()
            for cbid, name in known.items()
        }
        self._open: dict[int, list[tuple[str, Kind]]] = {}  # per thread: calls that have not returned
        self.calls: Counter[str] = Counter()
        self.graph_launches = 0
        self.sightings: list[Sighting] = []
        self.nodes: dict[int, tuple[Where, str | None]] = {}  # graph node -> where it was captured
        self.captured: list[Sighting] = []  # since a capture began, what makes nodes, in order

    def __call__(self, domain: int, cbid: int, address: int) -> None:
        stack = self._open.setdefault(threading.get_ident(), [])
        if domain in (cupti.DRIVER, cupti.RUNTIME):
            data = CallbackData.from_address(address)
            if data.site == cupti.ENTER:
                self._enter(stack, domain, cbid, data)
            elif stack:
                stack.pop()
        elif domain == cupti.RESOURCE and cbid == cupti.NODE_CREATED:
            graph = GraphData.from_address(ResourceData.from_address(address).descriptor)
            self.nodes[graph.node or 0] = here(), reason_here()
        elif domain == cupti.RESOURCE:
            self._implied("load", "a module was loaded", stack)
        else:
            self._implied("sync", "the host waited for the device", stack)

    def _enter(self, stack: list[tuple[str, Kind]], domain: int, cbid: int, data: CallbackData) -> None:
        entry = self._table.get((domain, cbid))
        if entry is None:  # newer than this library's list of names
            name = (data.function_name or b"?").decode()
            entry = plain(name), kind_of(name)
        name, kind = entry
        outer = [other for _, other in stack]
        stack.append(entry)
        if not outer:
            self.calls[name] += 1
        if kind == "graph launch" and "graph launch" not in outer:
            self.graph_launches += 1
        if any(other in LOUD or other == "copy" for other in outer):
            return  # told already, by the call around it
        if "BeginCapture" in name:
            self.captured.clear()
        if kind == "copy":
            self._see(kind, name, operands(name, data.params))
        elif kind in LOUD:
            self._see(kind, name)
        if kind in _NODES or (kind in ("alloc", "free") and name.endswith("Async")):
            self.captured.append(self.sightings[-1])

    def _implied(self, kind: Kind, what: str, stack: list[tuple[str, Kind]]) -> None:
        """What CUPTI tells of without a call of that kind: lazy loading at a first launch, a wait inside a copy."""
        if not any(other in ("sync", "copy", "alloc", "free", "load", "graph change") for _, other in stack):
            self._see(kind, f"{what} inside {stack[0][0]}" if stack else what)

    def _see(self, kind: Kind, name: str, copied: Operands | None = None) -> None:
        self.sightings.append(Sighting(kind, name, here(), reason_here(), copied))


def judged(sightings: list[Sighting], memory: Callable[[int], str]) -> list[Finding]:
    """The sightings that break the rules. Of copies these are the ones that wait, the ones from or to pageable host
    memory, and the ones whose operands cannot be read. `memory` tells whose memory an address is.
    """
    findings = []
    for seen in sightings:
        kind, what = str(seen.kind), seen.name
        if seen.kind == "copy":
            verdict = _copy_verdict(seen, memory)
            if verdict is None:
                continue
            kind, what = verdict
        findings.append(Finding("calls", kind, what, seen.where, allowed=seen.allowed))
    return findings


def _copy_verdict(seen: Sighting, memory: Callable[[int], str]) -> tuple[str, str] | None:
    if seen.operands is None:
        return "copy", f"{seen.name}, whose operands the guard cannot read"
    size = "" if seen.operands.size is None else f" of {seen.operands.size} bytes"
    if "pageable" in map(memory, seen.operands.addresses):
        return "pageable copy", f"{seen.name}{size} from or to host memory that is not pinned"
    if blocks(seen.name):
        return "sync", f"{seen.name}{size}, which waits until it is done"
    return None
