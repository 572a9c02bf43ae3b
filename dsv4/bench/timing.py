"""Times on the device: a chain of events around launches that follow each other without a gap, and a copy to compare.

`Timer` is what the benches need of a GPU; tests give them one that needs none.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from dsv4.errors import KernelError

COPY_BYTES = 1 << 31  # read and written together
Launch = Callable[[], object]


class Timer(Protocol):
    """Microseconds, and what else depends on a device being there."""

    def times(self, launch: Launch, *, repeats: int, warmup: int) -> list[float]:
        """Microseconds of each of `repeats` launches after `warmup` others; they are queued back to back."""

    def graph(self, launches: Sequence[Launch]) -> Launch:
        """One launch that does all of these."""

    def copy_gb_s(self) -> float:
        """Bytes read and written per nanosecond by a large copy on the device."""

    def capturing(self) -> bool:
        """Whether launches made now are recorded into a graph."""

    def kernels_of(self, launch: Launch) -> list[tuple[str, float]]:
        """(name, microseconds) of each kernel that one launch runs."""

    def reset_peak(self) -> None:
        """Forget the largest amount of memory held up to now."""

    def peak_bytes(self) -> int:
        """The largest amount of memory that tensors held since."""

    def l2_bytes(self) -> int:
        """Size of the cache that benches of single kernels must miss."""

    def name(self) -> str:
        """The device, in its maker's words."""


class CudaTimer:
    """The current CUDA device. Raises KernelError where there is none."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise KernelError("dsv4 bench measures a CUDA GPU, and torch sees none here; nothing was measured")

    def times(self, launch: Launch, *, repeats: int, warmup: int) -> list[float]:
        for _ in range(warmup):
            launch()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        torch.cuda.synchronize()
        events[0].record()
        for event in events[1:]:
            launch()
            event.record()
        events[-1].synchronize()
        return [a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(events)]

    def graph(self, launches: Sequence[Launch]) -> Launch:
        for launch in launches[:1]:
            launch()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for launch in launches:
                launch()
        return graph.replay

    def copy_gb_s(self) -> float:
        source = torch.zeros(COPY_BYTES // 2, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        us = statistics.median(self.times(lambda: target.copy_(source), repeats=20, warmup=5))
        return COPY_BYTES / us * 1e-3

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def kernels_of(self, launch: Launch) -> list[tuple[str, float]]:
        from torch.profiler import ProfilerActivity, profile

        launch()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            launch()
            torch.cuda.synchronize()
        events = profiled.events() or []
        return [(e.name, e.time_range.elapsed_us()) for e in events if str(e.device_type).endswith("CUDA")]

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
