"""Times of a CPU, for `dsv4 bench prefill`: by the clock, since what is asked for is done when the call returns."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence

from dsv4.bench.timing import Kernel, Launch, MarkTimer
from dsv4.errors import KernelError

COPY_BYTES, DENSE = 1 << 28, 1024


class ClockTimer(MarkTimer):
    """A Timer (timing.py) of this process's CPU. There are no graphs and no kernels to look at."""

    def __init__(self) -> None:
        super().__init__("cpu", COPY_BYTES, DENSE)

    def settle(self) -> None:
        """What returned is done."""

    def mark(self) -> float:
        return time.perf_counter() * 1e6

    def between(self, first: float, last: float) -> float:
        return last - first

    def graph(self, launches: Sequence[Launch]) -> Launch:
        raise KernelError("a CPU has no graphs; dsv4 bench times them on a GPU")

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
