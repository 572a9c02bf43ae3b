"""The KV cache: `max_seqs` slots with a window ring and compressor state each, and pages of compressed entries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.config import LayerSpec, ModelConfig
from dsv4.errors import CapacityError
from dsv4.kvcache.layout import PAGE_ENTRIES, pages, state_tokens


class LayerCache:
    """One layer's storage.

    ring [S, W, Dh]; and for compressed layers state [S, n, 2C] f32 (u | g + ape), pool [P, 64, Dh] and, CSA only, the
    indexer's index_state [S, n, 4*Ci] f32 and index_pool [P, 64, Ci].
    """

    def __init__(self, config: ModelConfig, spec: LayerSpec, slots: int, n_pages: int, dtype: torch.dtype, device: str):
        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.ring = zeros(slots, config.sliding_window, config.head_dim)
        if spec.kind == "window":
            return
        n, overlap = state_tokens(spec.kind, spec.ratio), 2 if spec.kind == "csa" else 1
        self.state = zeros(slots, n, 2 * overlap * config.head_dim, dtype=torch.float32)
        self.pool = zeros(n_pages, PAGE_ENTRIES, config.head_dim)
        if spec.kind == "csa":
            self.index_state = zeros(slots, n, 2 * overlap * config.index_head_dim, dtype=torch.float32)
            self.index_pool = zeros(n_pages, PAGE_ENTRIES, config.index_head_dim)


class PageTable:
    """Pages of one kind of compressed layer: one page number for every such layer's pool. Host side, between steps."""

    def __init__(self, ratio: int, n_pages: int, slots: int):
        self.ratio = ratio
        self.free = list(range(n_pages - 1, -1, -1))
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self._rows = [torch.empty(0, dtype=torch.int64) for _ in range(slots)]

    def missing(self, slot: int, tokens: int) -> int:
        return max(0, pages(tokens, self.ratio) - len(self.held[slot]))

    def grow(self, slot: int, tokens: int) -> None:
        count = self.missing(slot, tokens)
        if count:
            self.held[slot] += [self.free.pop() for _ in range(count)]
            first = torch.tensor(self.held[slot]).unsqueeze(-1) * PAGE_ENTRIES
            self._rows[slot] = (first + torch.arange(PAGE_ENTRIES)).flatten()

    def release(self, slot: int) -> None:
        self.free.extend(reversed(self.held[slot]))
        self.held[slot].clear()

    def rows(self, slot: int, first: int, last: int) -> Tensor:
        """[last - first] i64: rows of entries first..last-1 of the slot in the flattened pool [P*64, ...]."""
        return self._rows[slot][first:last]


class KVCache:
    """Storage of at most `max_seqs` sequences with `max_tokens` tokens together. Capacity is checked, never overrun."""

    def __init__(self, config: ModelConfig, max_seqs: int, max_tokens: int, *, dtype: torch.dtype, device: str):
        if max_seqs < 1 or max_tokens < 1:
            raise CapacityError(f"a cache needs max_seqs >= 1 and max_tokens >= 1, got {max_seqs} and {max_tokens}")
        self.config, self.max_seqs, self.max_tokens, self.device = config, max_seqs, max_tokens, device
        kinds = {(spec.kind, spec.ratio) for spec in config.layers if spec.ratio}
        # A sequence that has just started a page wastes the rest of it: one page per slot on top of the tokens' share.
        n_pages = {kind: pages(max_tokens, kind[1]) + max_seqs for kind in kinds}
        self.tables = {kind: PageTable(kind[1], n_pages[kind], max_seqs) for kind in sorted(kinds)}
        self.layers = [
            LayerCache(config, spec, max_seqs, n_pages.get((spec.kind, spec.ratio), 0), dtype, device)
            for spec in config.layers
        ]
        self._lengths = [0] * max_seqs
        self._used = [False] * max_seqs
        self._free_slots = list(range(max_seqs - 1, -1, -1))

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def free_tokens(self) -> int:
        """Tokens that may still be appended, over all slots."""
        return self.max_tokens - sum(self._lengths)

    def acquire(self) -> int:
        """An empty slot. A slot's old contents are never read: what a row may see follows from its length alone."""
        if not self._free_slots:
            raise CapacityError(
                f"all {self.max_seqs} sequence slots are in use; release one or load with more max_seqs"
            )
        slot = self._free_slots.pop()
        self._used[slot], self._lengths[slot] = True, 0
        return slot

    def release(self, slot: int) -> None:
        self._known(slot)
        for table in self.tables.values():
            table.release(slot)
        self._used[slot], self._lengths[slot] = False, 0
        self._free_slots.append(slot)

    def length(self, slot: int) -> int:
        """Tokens of the sequence in `slot`."""
        return self._lengths[self._known(slot)]

    def reserve(self, wanted: Sequence[tuple[int, int]]) -> None:
        """Make room for (slot, new tokens) of each sequence; all or nothing."""
        limit = self.config.max_position_embeddings
        after = {slot: self.length(slot) + new_tokens for slot, new_tokens in wanted}
        for slot, tokens in after.items():
            if tokens > limit:
                raise CapacityError(
                    f"sequence of {tokens} tokens (slot {slot}) exceeds max_position_embeddings = {limit}"
                )
        total = sum(new_tokens for _, new_tokens in wanted)
        if total > self.free_tokens:
            raise CapacityError(
                f"{total} tokens do not fit: the cache holds max_tokens = {self.max_tokens} and "
                f"{self.max_tokens - self.free_tokens} are in use"
            )
        for slot, tokens in after.items():
            for table in self.tables.values():
                table.grow(slot, tokens)

    def advance(self, slot: int, new_tokens: int) -> None:
        self._lengths[self._known(slot)] += new_tokens

    def _known(self, slot: int) -> int:
        if not (0 <= slot < self.max_seqs and self._used[slot]):
            raise CapacityError(f"slot {slot} holds no sequence; take one with acquire() (max_seqs = {self.max_seqs})")
        return slot
