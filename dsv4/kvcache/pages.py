"""Which pages of the pools each sequence holds, on the host and in the copy that kernels read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.kvcache.layout import PAGE_ENTRIES, pages


class PageTable:
    """Pages of one kind of compressed layer: one page number for every such layer's pool.

    `numbers` [S, P] i64 holds each slot's pages in order, -1 behind them. Host side; it changes between steps only.
    `on_device` [S, P] i64 is its copy on the cache's device (on a CPU the same tensor); behind a slot's pages it may
    hold those of an earlier sequence, which nothing reads: what a row may see follows from its position alone.
    """

    def __init__(self, ratio: int, n_pages: int, slots: int, width: int | None = None, device: str = "cpu"):
        self.ratio = ratio
        self.free = list(range(n_pages - 1, -1, -1))
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self.numbers = torch.full((slots, n_pages if width is None else width), -1)
        self.on_device = self.numbers.to(device)
        self._changed: dict[int, int] = {}  # slot -> its first page that the device does not know
        self._staging: Tensor | None = None
        if self.on_device.is_cuda:
            self._staging = torch.empty(n_pages, dtype=torch.int64, pin_memory=True)
            self._copied = torch.cuda.Event()

    def missing(self, slot: int, tokens: int) -> int:
        return max(0, pages(tokens, self.ratio) - len(self.held[slot]))

    def grow(self, slot: int, tokens: int) -> None:
        count = self.missing(slot, tokens)
        if count:
            held = self.held[slot]
            first = len(held)
            held += [self.free.pop() for _ in range(count)]
            self.numbers[slot, first : len(held)] = torch.tensor(held[first:])
            self._changed.setdefault(slot, first)

    def release(self, slot: int) -> None:
        self.free.extend(reversed(self.held[slot]))
        self.held[slot].clear()
        self.numbers[slot] = -1
        self._changed.pop(slot, None)

    def upload(self) -> None:
        """Bring the device's copy up to date: what changed, from pinned memory, on the current stream."""
        changed, self._changed = self._changed, {}
        if self._staging is None or not changed:
            return
        self._copied.synchronize()  # the staged numbers of the last upload have been read
        staged = 0
        for slot, first in changed.items():
            new = self.numbers[slot, first : len(self.held[slot])]
            part = self._staging[staged : staged + len(new)].copy_(new)
            self.on_device[slot, first : first + len(new)].copy_(part, non_blocking=True)
            staged += len(new)
        self._copied.record()

    def pages(self, slots: Sequence[int], count: int) -> Tensor:
        """[B, count] i64: the first pages of each slot, -1 = none."""
        if len(slots) == 1:
            return self.numbers[slots[0] : slots[0] + 1, :count]
        return self.numbers[list(slots), :count]

    def row(self, slot: int, entry: int) -> int:
        """Row of an entry of the slot in the flattened pool [P*64, ...]."""
        return self.held[slot][entry // PAGE_ENTRIES] * PAGE_ENTRIES + entry % PAGE_ENTRIES

    def rows(self, slot: int, first: int, last: int) -> Tensor:
        """[last - first] i64: rows of entries first..last-1."""
        entry = torch.arange(first, last)
        return self.numbers[slot][entry // PAGE_ENTRIES] * PAGE_ENTRIES + entry % PAGE_ENTRIES
