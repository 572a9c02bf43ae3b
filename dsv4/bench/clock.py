"""Times of a CPU, for `dsv4 bench prefill`: by the clock, since what is asked for is done when the call returns."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Sequence

import torch

from dsv4.bench.timing import Kernel, Launch
from dsv4.errors import KernelError

COPY_BYTES = 1 << 28  # read and written together
DENSE = 1024  # rows and columns of the matrices whose product is the dense rate


class ClockTimer:
    """A Timer (timing.py) of this process's CPU. There are no graphs and no kernels to look at."""

    def times(self, launch: Launch, *, repeats: int, warmup: int) -> list[float]:
        for _ in range(warmup):
            launch()
        marks = [self.mark()]
        for _ in range(repeats):
            launch()
            marks.append(self.mark())
        return [self.between(*marks[i : i + 2]) for i in range(repeats)]

    def mark(self) -> float:
        return time.perf_counter() * 1e6

    def between(self, first: float, last: float) -> float:
        return last - first

    def graph(self, launches: Sequence[Launch]) -> Launch:
        raise KernelError("a CPU has no graphs; dsv4 bench times them on a GPU")

    def copy_gb_s(self) -> float:
        source = torch.zeros(COPY_BYTES // 2, dtype=torch.uint8)
        target = torch.empty_like(source)
        return COPY_BYTES / statistics.median(self.times(lambda: target.copy_(source), repeats=5, warmup=1)) * 1e-3

    def dense_tflop_s(self) -> float:
        a, b = (torch.randn(DENSE, DENSE).bfloat16() for _ in range(2))
        return 2 * DENSE**3 / statistics.median(self.times(lambda: a @ b, repeats=3, warmup=1)) * 1e-6

    def capturing(self) -> bool:
        return False

    def kernels_of(self, launch: Launch) -> list[Kernel]:
        raise KernelError("a CPU launches no kernels; dsv4 bench looks at those of a GPU")

    def reset_peak(self) -> None:
        """There is no such thing: the peak is that of the process."""

    def peak_bytes(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def l2_bytes(self) -> int:
        raise KernelError("dsv4 bench does not know a CPU's caches; it misses those of a GPU")

    def name(self) -> str:
        return "CPU"
