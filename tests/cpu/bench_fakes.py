"""A clock, a decode step and a run for tests of dsv4 bench: nothing here needs a GPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar

import torch

from dsv4.bench import report
from dsv4.bench.timing import Kernel, Launch
from dsv4.kvcache import KVCache
from dsv4.model import Model

RUN = report.Run("random:tiny", 5, 1, "bf16", "Fake GPU", 4000.0, "abc", "dsv4 bench decode")


class FakeTimer:
    """Runs what it is given and says 100, 101, ... microseconds, in a shuffled order."""

    capture = False

    def times(self, launch: Launch, *, repeats: int, warmup: int) -> list[float]:
        for _ in range(warmup + repeats):
            launch()
        return [100.0 + (7 * i) % repeats for i in range(repeats)]

    def mark(self) -> float:
        return time.perf_counter()

    def between(self, first: float, last: float) -> float:
        return (last - first) * 1e6

    def graph(self, launches: Sequence[Launch]) -> Launch:
        return lambda: [launch() for launch in launches[:1]]

    def copy_gb_s(self) -> float:
        return 4000.0

    def dense_tflop_s(self) -> float:
        return 800.0

    def capturing(self) -> bool:
        return FakeTimer.capture

    def kernels_of(self, launch: Launch) -> list[Kernel]:
        """A layer's mHC, routing and experts five times over, 2 us each, another 5 us, and what leaves the layers."""
        launch()
        layer = ("mhc_seam", 2), ("ffn_inputs", 2), ("few", 2), ("other", 5)
        found, at = [], 100.0
        for name, us in (*layer * 5, ("mhc_post", 2)):
            found.append(Kernel(f"void (anonymous namespace)::{name}<6>(float const*)", at, at + us))
            at += us
        return found

    def reset_peak(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return 12345

    def l2_bytes(self) -> int:
        return 1000

    def name(self) -> str:
        return "NVIDIA Fake 80GB"


class FakeStep:
    """A decode step by Model.forward: what the graph of a GPU does, at the speed of a test."""

    kernels = 77
    made: ClassVar[list[tuple[int, int]]] = []

    def __init__(self, model: Model, cache: KVCache, rows: int, longest: int):
        self.model, self.cache, self.rows = model, cache, rows
        assert 0 < longest <= cache.max_tokens
        FakeStep.made.append((rows, cache.max_tokens))

    def stage(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        assert len(slots) == len(tokens) == self.rows
        self.batch = [(slot, torch.tensor([token])) for slot, token in zip(slots, tokens, strict=True)]

    def capture(self) -> None:
        FakeTimer.capture = True
        self.replay()
        FakeTimer.capture = False

    def replay(self) -> None:
        assert torch.isfinite(self.model.forward(self.batch, self.cache)).all()
