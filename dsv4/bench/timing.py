"""Times on the device: a chain of events around launches that follow each other without a gap, and a copy to compare.

`Timer` is what the benches need of a GPU, of a CPU `dsv4 bench prefill` (clock.py); tests give them one of their own.
"""

from __future__ import annotations

import itertools
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dsv4.errors import KernelError

COPY_BYTES = 1 << 31  # read and written together
PROFILED = 3  # launches, of which the last counts
DENSE = 8192  # rows and columns of the matrices whose product is the dense rate
Launch = Callable[[], object]


@dataclass(frozen=True)
class Kernel:
    """A kernel, copy or memset that ran: from when to when, in microseconds on the device's clock."""

    name: str
    start: float
    end: float


class Timer(Protocol):
    """Microseconds, and what else depends on a device being there."""

    def times(self, launch: Launch, *, repeats: int, warmup: int) -> list[float]:
        """Microseconds of each of `repeats` launches after `warmup` others; they are queued back to back."""

    def mark(self) -> Any:
        """A point in the work that is asked for: it is reached when all in front of it is done."""

    def between(self, first: Any, last: Any) -> float:
        """Microseconds from one mark to a later one; waits for that."""

    def graph(self, launches: Sequence[Launch]) -> Launch:
        """One launch that does all of these, each behind the one before."""

    def copy_gb_s(self) -> float:
        """Bytes read and written per nanosecond by a large copy on the device."""

    def dense_tflop_s(self) -> float:
        """10^12 multiplications and additions a second of a large dense BF16 product of random numbers."""

    def capturing(self) -> bool:
        """Whether launches made now are recorded into a graph."""

    def kernels_of(self, launch: Launch) -> list[Kernel]:
        """What one launch runs, by its start. All ranks of a model call it together."""

    def reset_peak(self) -> None:
        """Forget the largest amount of memory held up to now."""

    def peak_bytes(self) -> int:
        """The largest amount of memory that tensors held since."""

    def l2_bytes(self) -> int:
        """Size of the cache that benches of single kernels must miss."""

    def name(self) -> str:
        """The device, in its maker's words."""


class MarkTimer(ABC):
    """What marks alone say. copy_bytes: of a copy, read and written together; dense: rows and columns of the matrices
    whose product is the dense rate.
    """

    def __init__(self, device: str, copy_bytes: int, dense: int):
        self.device, self.copy_bytes, self.dense = device, copy_bytes, dense

    @abstractmethod
    def settle(self) -> None:
        """Waits until all that was asked for is done."""

    @abstractmethod
    def mark(self) -> Any:
        """See Timer."""

    @abstractmethod
    def between(self, first: Any, last: Any) -> float:
        """See Timer."""

    def times(self, launch: Launch, *, repeats: int, warmup: int) -> list[float]:
        for _ in range(warmup):
            launch()
        self.settle()
        marks = [self.mark()]
        for _ in range(repeats):
            launch()
            marks.append(self.mark())
        return [self.between(first, last) for first, last in itertools.pairwise(marks)]

    def copy_gb_s(self) -> float:
        source = torch.zeros(self.copy_bytes // 2, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        us = statistics.median(self.times(lambda: target.copy_(source), repeats=20, warmup=5))
        return self.copy_bytes / us * 1e-3

    def dense_tflop_s(self) -> float:
        a, b = (torch.randn(self.dense, self.dense, device=self.device).bfloat16() for _ in range(2))
        out = torch.empty_like(a)
        us = statistics.median(self.times(lambda: torch.mm(a, b, out=out), repeats=10, warmup=3))
        return 2 * self.dense**3 / us * 1e-6


class CudaTimer(MarkTimer):
    """The current CUDA device. Raises KernelError where there is none."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise KernelError("dsv4 bench measures a CUDA GPU, and torch sees none here; nothing was measured")
        super().__init__("cuda", COPY_BYTES, DENSE)

    def settle(self) -> None:
        torch.cuda.synchronize()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        last.synchronize()
        return first.elapsed_time(last) * 1e3

    def graph(self, launches: Sequence[Launch]) -> Launch:
        for launch in launches[:1]:
            launch()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for launch in launches:
                launch()
        return graph.replay

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def kernels_of(self, launch: Launch) -> list[Kernel]:
        """Of several launches the last: ranks wait for one another inside a launch, so the first one also holds the
        time between the starts of their profilers, the second the time between their hosts. The last one is queued.
        """
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
            launch()
            torch.cuda.synchronize()
            for _ in range(PROFILED - 1):
                launch()
            torch.cuda.synchronize()
        events = [e for e in profiled.events() or [] if str(e.device_type).endswith("CUDA")]
        return last_launch([Kernel(e.name, e.time_range.start, e.time_range.end) for e in events], PROFILED)

    def reset_peak(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated()

    def l2_bytes(self) -> int:
        return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size

    def name(self) -> str:
        return torch.cuda.get_device_name()


def last_launch(kernels: Sequence[Kernel], launches: int) -> list[Kernel]:
    """What the last of `launches` equal launches ran. KernelError where they do not come out equal."""
    found = sorted(kernels, key=lambda kernel: (kernel.start, kernel.end))
    each, rest = divmod(len(found), launches)
    last, before = found[len(found) - each :], found[len(found) - 2 * each : len(found) - each]
    if rest or not each or sorted(k.name for k in last) != sorted(k.name for k in before):
        raise KernelError(
            f"the profiler saw {len(found)} kernels of {launches} equal launches, which cannot be told apart"
        )
    return last
