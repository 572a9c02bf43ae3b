"""The KV cache: `max_seqs` slots with a window ring and compressor state each, and pages of compressed entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.config import LayerSpec, ModelConfig
from dsv4.errors import CapacityError, ConfigError
from dsv4.kvcache.layout import PAGE_ENTRIES, pages, state_tokens
from dsv4.kvcache.pages import PageTable
from dsv4.quant import kv


@dataclass(frozen=True)
class Rows:
    """Elements and dtype of one stored entry and one stored index key."""

    entry: tuple[int, torch.dtype]
    index_key: tuple[int, torch.dtype]

    @staticmethod
    def of(config: ModelConfig, dtype: torch.dtype, pack_entries: bool, pack_index_keys: bool) -> Rows:
        if (pack_entries or pack_index_keys) and dtype != torch.bfloat16:
            raise ConfigError(f"a packed cache holds bfloat16 values; {dtype} needs a cache that is not packed")
        head, rope, index = config.head_dim, config.qk_rope_head_dim, config.index_head_dim
        return Rows(
            (kv.entry_bytes(head, rope), torch.uint8) if pack_entries else (head, dtype),
            (kv.index_key_bytes(index), torch.uint8) if pack_index_keys else (index, dtype),
        )


class LayerCache:
    """One layer's storage.

    ring [S, W, Dh]; and for compressed layers state [S, n, 2C] f32 (u | g + ape), pool [P, 64, Dh] and, CSA only, the
    indexer's index_state [S, n, 4*Ci] f32 and index_pool [P, 64, Ci]. Packed entries are u8 [.., entry_bytes(Dh, R)],
    packed index keys u8 [.., index_key_bytes(Ci)] (quant/kv.py).
    """

    def __init__(self, config: ModelConfig, spec: LayerSpec, slots: int, n_pages: int, rows: Rows, device: str):
        def zeros(*shape: int, row: tuple[int, torch.dtype]) -> Tensor:
            return torch.zeros((*shape, row[0]), dtype=row[1], device=device)

        self.ring = zeros(slots, config.sliding_window, row=rows.entry)
        if spec.kind == "window":
            return
        n, overlap = state_tokens(spec.kind, spec.ratio), 2 if spec.kind == "csa" else 1
        self.state = zeros(slots, n, row=(2 * overlap * config.head_dim, torch.float32))
        self.pool = zeros(n_pages, PAGE_ENTRIES, row=rows.entry)
        if spec.kind == "csa":
            self.index_state = zeros(slots, n, row=(2 * overlap * config.index_head_dim, torch.float32))
            self.index_pool = zeros(n_pages, PAGE_ENTRIES, row=rows.index_key)

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in vars(self).values())


class KVCache:
    """Storage of at most `max_seqs` sequences with `max_tokens` tokens together. Capacity is checked, never overrun.

    pack_entries, pack_index_keys: hold the bytes of quant/kv.py instead of values in `dtype`. They read back the same
    bit for bit, provided that what is stored is rounded that way (kv_quant, index_quant).
    """

    def __init__(
        self,
        config: ModelConfig,
        max_seqs: int,
        max_tokens: int,
        *,
        dtype: torch.dtype,
        device: str,
        pack_entries: bool = False,
        pack_index_keys: bool = False,
    ):
        if max_seqs < 1 or max_tokens < 1:
            raise CapacityError(f"a cache needs max_seqs >= 1 and max_tokens >= 1, got {max_seqs} and {max_tokens}")
        self.config, self.max_seqs, self.max_tokens, self.device = config, max_seqs, max_tokens, device
        kinds = {(spec.kind, spec.ratio) for spec in config.layers if spec.ratio}
        # A sequence that has just started a page wastes the rest of it: one page per slot on top of the tokens' share.
        n_pages = {kind: pages(max_tokens, kind[1]) + max_seqs for kind in kinds}
        longest = min(max_tokens, config.max_position_embeddings)
        self.tables = {
            kind: PageTable(kind[1], n_pages[kind], max_seqs, max(1, pages(longest, kind[1])), device)
            for kind in sorted(kinds)
        }
        rows = Rows.of(config, dtype, pack_entries, pack_index_keys)
        self.layers = [
            LayerCache(config, spec, max_seqs, n_pages.get((spec.kind, spec.ratio), 0), rows, device)
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

    @property
    def nbytes(self) -> int:
        """Bytes of the layers' storage: entries, index keys, windows and compressor states."""
        return sum(layer.nbytes for layer in self.layers)

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
        for table in self.tables.values():
            table.upload()

    def advance(self, slot: int, new_tokens: int) -> None:
        self._lengths[self._known(slot)] += new_tokens

    def _known(self, slot: int) -> int:
        if not (0 <= slot < self.max_seqs and self._used[slot]):
            raise CapacityError(f"slot {slot} holds no sequence; take one with acquire() (max_seqs = {self.max_seqs})")
        return slot
