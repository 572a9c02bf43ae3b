"""Record what a stretch of code does: every CUDA call of every thread, torch's allocator, processes and libraries."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any

import torch

from dsv4.engine.guard import allowed, cupti
from dsv4.engine.guard.calls import CallLog, judged
from dsv4.engine.guard.driver import driver
from dsv4.engine.guard.findings import Finding, merged
from dsv4.engine.guard.where import Where, here, places
from dsv4.errors import KernelError

COUNTERS = ("allocation.all.allocated", "segment.all.allocated", "segment.all.freed", "num_alloc_retries")
_PROCESS_EVENTS = {
    "subprocess.Popen": "a process was started",
    "os.system": "a shell was started",
    "os.posix_spawn": "a process was started",
    "os.exec": "the process was replaced",
    "ctypes.dlopen": "a library was opened",
}
_hook_lock = threading.Lock()
_hook_installed = False


class Watch:
    """`with Watch() as seen: step()`; afterwards `seen.findings`, `seen.graph_launches`, `seen.calls`,
    `seen.allocator`. Findings of the kinds in `ignore` are left out (the kernels of an eager run). One at a time, as
    CUPTI has one subscriber. The watch itself waits for nothing.
    """

    def __init__(self, *, ignore: Collection[str] = ()):
        self.findings: list[Finding] = []
        self.calls: dict[str, int] = {}
        self.allocator: dict[str, int] = {}
        self.allows: list[tuple[str, Where]] = []  # uses of `allow`: reason and place
        self._ignore = ignore
        self._processes: list[Finding] = []
        self._spans: list[tuple[str, int, int]] = []  # reason, torch allocations before and after
        self._open_spans: list[tuple[str, int]] = []

    def __enter__(self) -> Watch:
        library = cupti.cupti()
        driver()
        _install_hook()
        torch.cuda.current_stream()  # what torch does once per process is done
        self.log = CallLog(library.names)
        self._subscription = cupti.Subscription(library, self.log)
        self._history(True)
        self._before = torch.cuda.memory_stats()
        try:
            self._subscription.start()
        except KernelError:
            self._history(False)
            raise
        allowed.LISTENERS.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        allowed.LISTENERS.remove(self)
        self._subscription.stop()
        after = torch.cuda.memory_stats()
        self.allocator = {name: int(after.get(name, 0)) - int(self._before.get(name, 0)) for name in COUNTERS}
        events = self._history(False)
        if self._subscription.errors:
            failure = self._subscription.errors[0]
            raise KernelError(f"the recorder failed inside a CUDA call: {failure!r}") from failure
        self.calls = dict(sorted(self.log.calls.items()))
        calls = judged(self.log.sightings, driver().memory)
        found = [*calls, *self._processes, *self._allocations(events)]
        self.findings = merged(finding for finding in found if finding.kind not in self._ignore)

    @property
    def graph_launches(self) -> int:
        return self.log.graph_launches

    # -- torch's allocator: memory it hands out from its cache is no CUDA call

    def _allocations(self, events: list[dict[str, Any]]) -> list[Finding]:
        """One finding per tensor that torch's allocator made, with the line its history names."""
        count = self.allocator["allocation.all.allocated"]
        made = [event for event in events if event.get("action") == "alloc"][-count:] if count else []
        findings = []
        for index in range(count):
            event = made[index] if len(made) == count else {}
            frames = [(f["filename"], f["line"], f["name"]) for f in event.get("frames", ())]
            size = f" of {event['size']} bytes" if "size" in event else ""
            where = Where(places(frames)) if frames else None
            reason = next((why for why, first, last in self._spans if first <= index < last), None)
            findings.append(Finding("calls", "tensor", f"torch's allocator made a tensor{size}", where, allowed=reason))
        if self.allocator["num_alloc_retries"]:
            findings.append(Finding("calls", "alloc", "torch's allocator ran out of memory and flushed its cache"))
        return findings

    @staticmethod
    def _history(on: bool) -> list[dict[str, Any]]:
        """Switch the history of torch's allocator on, or off and return it."""
        record: Callable[..., None] = torch.cuda.memory._record_memory_history
        if on:
            record(None)  # drops what an earlier recording left
            record("all", context="alloc", stacks="python", max_entries=100_000)
            return []
        traces = torch.cuda.memory._snapshot()["device_traces"]
        record(None)
        return list(traces[torch.cuda.current_device()])

    def _made(self) -> int:
        now = torch.cuda.memory_stats()
        return int(now["allocation.all.allocated"]) - int(self._before["allocation.all.allocated"])

    # -- allow

    def allow_begins(self, reason: str) -> None:
        self.allows.append((reason, here()))
        self._open_spans.append((reason, self._made()))

    def allow_ends(self) -> None:
        if self._open_spans:
            reason, first = self._open_spans.pop()
            self._spans.append((reason, first, self._made()))

    # -- processes and libraries

    def process_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        what = f"{_PROCESS_EVENTS[event]}: {_first_words(arguments)}"
        kind = "load" if event == "ctypes.dlopen" else "process"
        self._processes.append(Finding("calls", kind, what, here(), allowed=allowed.reason_here()))


def _first_words(arguments: tuple[Any, ...]) -> str:
    """A command in short, without the folder it lies in."""
    command = arguments[1] if len(arguments) > 1 and isinstance(arguments[1], list | tuple) else arguments[:1]
    words = [str(word).rsplit("/", 1)[-1] for word in command]
    return " ".join(words)[:80]


def _install_hook() -> None:
    """Python's audit hook cannot be taken away, so there is one, which tells the watches under way."""
    global _hook_installed
    with _hook_lock:
        if not _hook_installed:
            sys.addaudithook(_audit)
            _hook_installed = True


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _PROCESS_EVENTS:
        for listener in allowed.LISTENERS:
            if isinstance(listener, Watch):
                listener.process_event(event, arguments)
