"""One step as row numbers: which cache rows each token reads and writes. Made once, for all layers: on the host what is
one number a token, on the cache's device the tables of what each token sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from dsv4.errors import RequestError
from dsv4.kernels.compress.rows import CompressRows
from dsv4.kvcache import rows_chunk, rows_decode
from dsv4.kvcache.cache import KVCache
from dsv4.kvcache.layout import PAGE_ENTRIES, CompressedKind, entries, entry_rows
from dsv4.kvcache.pages import PageTable
from dsv4.kvcache.rows import CompressedRows, Segment, WindowRows


@dataclass(frozen=True)
class Plan:
    """A step of T tokens of B sequences."""

    segments: list[Segment]
    tokens: Tensor  # [T] i64
    positions: Tensor  # [T] i64
    window: WindowRows
    compressed: dict[CompressedKind, CompressedRows]
    spans: list[tuple[int, int]]  # first and last+1 row of each sequence

    @property
    def last_rows(self) -> Tensor:
        return torch.tensor([last - 1 for _, last in self.spans])


def make_plan(batch: Sequence[tuple[int, Tensor]], cache: KVCache) -> Plan:
    """batch: (slot, ids [n] i64) per sequence, n >= 1, slots distinct. Reserves the pages the step appends to."""
    slots = [slot for slot, _ in batch]
    if not slots or len(set(slots)) != len(slots):
        raise RequestError(f"a step takes each sequence once, at least one; got slots {slots}")
    segments, first = [], 0
    for slot, ids in batch:
        if ids.dim() != 1 or not len(ids):
            raise RequestError(f"token ids must be a non-empty 1-d tensor, got shape {list(ids.shape)}")
        segments.append(Segment(slot, cache.length(slot), len(ids), first))
        first += len(ids)
    tokens = torch.cat([ids for _, ids in batch]).to(torch.int64)
    vocab = cache.config.vocab_size
    for token in tokens.tolist():
        if not 0 <= token < vocab:
            raise RequestError(f"token id {token} is outside the vocabulary 0..{vocab - 1}")
    cache.reserve([(s.slot, s.length) for s in segments])
    positions = torch.cat([torch.arange(s.start, s.end) for s in segments])
    size, device = cache.config.sliding_window, cache.device
    if len(tokens) == len(segments):
        window, compress_rows = rows_decode.window_rows(segments, positions, size), rows_decode.compress_rows
    else:
        window, compress_rows = rows_chunk.window_rows(segments, positions, size, device), rows_chunk.compress_rows
    compressed = {
        kind: _compressed(segments, positions, table, compress_rows(segments, positions, table, kind), topk, device)
        for kind, table in cache.tables.items()
        for topk in [cache.config.index_topk if kind[0] == "csa" else None]
    }
    spans = [(s.first, s.first + s.length) for s in segments]
    plan = Plan(segments, tokens, positions, window, compressed, spans)
    return plan if cache.device == "cpu" else _to_device(plan, cache.device)


def _compressed(
    segments: list[Segment],
    positions: Tensor,
    table: PageTable,
    compress: CompressRows,
    topk: int | None,
    device: str,
) -> CompressedRows:
    """topk: of the entries a selection takes, None where all are seen. The rows [T, E] are made on `device`."""
    most = max(entries(s.end, table.ratio) for s in segments)
    sequence = torch.arange(len(segments))
    if len(positions) > len(segments):
        sequence = sequence.repeat_interleave(torch.tensor([s.length for s in segments]))
    pages = table.pages([s.slot for s in segments], -(-most // PAGE_ENTRIES)).to(device)
    visible, sequence = ((positions + 1) // table.ratio).to(device), sequence.to(device)
    width = 0 if topk is not None and most > topk else most
    all_rows = entry_rows(pages, width)
    if len(positions) > 1:
        all_rows = all_rows[sequence].masked_fill_(torch.arange(width, device=device) >= visible.unsqueeze(-1), -1)
    return CompressedRows(compress, visible, pages, sequence, all_rows, most)


def _to_device(rows: Any, device: str) -> Any:
    """A copy of a (nested) record of row numbers with every tensor on `device`."""
    if isinstance(rows, Tensor):
        return rows.to(device)
    if isinstance(rows, dict):
        return {key: _to_device(value, device) for key, value in rows.items()}
    if isinstance(rows, Plan | WindowRows | CompressedRows | CompressRows):
        return replace(rows, **{f.name: _to_device(getattr(rows, f.name), device) for f in fields(rows)})
    return rows
