"""One step as row numbers: which cache rows each token reads and writes. Made once on the host, for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from dsv4.errors import RequestError
from dsv4.kernels.compress.rows import CompressRows
from dsv4.kvcache.cache import KVCache, PageTable
from dsv4.kvcache.layout import CompressedKind, entries, state_tokens


@dataclass(frozen=True)
class Segment:
    """`length` new tokens of the sequence in `slot`, at positions start .. start+length-1, rows first ..
    first+length-1.
    """

    slot: int
    start: int
    length: int
    first: int

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class WindowRows:
    """Rows (i64) of the sliding window. `in_ring`: all keys are in the ring once this step's are written (decode)."""

    in_ring: bool
    history: Tensor  # [Nh] ring rows read before writing; rows index (history | this step's entries) unless in_ring
    rows: Tensor  # [T, W] what each token sees, -1 = before the sequence began
    write_rows: Tensor  # [Tw] tokens of this step that stay in the ring
    write_to: Tensor  # [Tw]


@dataclass(frozen=True)
class CompressedRows:
    """Rows (i64) of one kind of compressed layer."""

    compress: CompressRows
    visible: Tensor  # [T] entries each token sees: (t + 1) // ratio
    entries: Tensor  # [B, E] pool row of each sequence's entries, -1 = none
    all_rows: Tensor  # [T, E] the same per token, -1 where not visible; [T, 0] when `most_visible` forces a selection
    most_visible: int


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
    low, high = torch.aminmax(tokens)
    if low < 0 or high >= vocab:
        raise RequestError(f"token id {int(high if high >= vocab else low)} is outside the vocabulary 0..{vocab - 1}")
    for seg in segments:
        cache.reserve(seg.slot, seg.length)
    positions = torch.cat([torch.arange(s.start, s.end) for s in segments])
    compressed = {kind: _compressed(segments, positions, table, kind, cache) for kind, table in cache.tables.items()}
    window = _window(segments, positions, cache.config.sliding_window)
    spans = [(s.first, s.first + s.length) for s in segments]
    plan = Plan(segments, tokens, positions, window, compressed, spans)
    return plan if cache.device == "cpu" else _to_device(plan, cache.device)


def _to_device(rows: Any, device: str) -> Any:
    """A copy of a (nested) record of row numbers with every tensor on `device`."""
    if isinstance(rows, Tensor):
        return rows.to(device)
    if isinstance(rows, dict):
        return {key: _to_device(value, device) for key, value in rows.items()}
    if isinstance(rows, Plan | WindowRows | CompressedRows | CompressRows):
        return replace(rows, **{f.name: _to_device(getattr(rows, f.name), device) for f in fields(rows)})
    return rows


def _ring_write(segments: list[Segment], n: int) -> tuple[Tensor, Tensor]:
    """Rows of this step that stay in rings of n tokens, and where: token t of slot s at s * n + t mod n."""
    kept = [(s, max(s.start, s.end - n)) for s in segments]
    rows = torch.cat([torch.arange(s.first + low - s.start, s.first + s.length) for s, low in kept])
    to = torch.cat([s.slot * n + torch.arange(low, s.end) % n for s, low in kept])
    return rows, to


def _window(segments: list[Segment], positions: Tensor, size: int) -> WindowRows:
    write_rows, write_to = _ring_write(segments, size)
    back = torch.arange(size - 1, -1, -1)
    seen = positions.unsqueeze(-1) - back  # [T, W] positions each token looks at, oldest first
    if all(s.length == 1 for s in segments):
        slots = torch.tensor([s.slot for s in segments]).unsqueeze(-1)
        rows = (slots * size + seen % size).masked_fill(seen < 0, -1)
        return WindowRows(True, torch.empty(0, dtype=torch.int64), rows, write_rows, write_to)
    history, offsets, held = [], [], 0
    for s in segments:
        low = max(0, s.start - size + 1)
        history.append(s.slot * size + torch.arange(low, s.start) % size)
        offsets.append((low, held))
        held += s.start - low
    parts = []
    for s, (low, base) in zip(segments, offsets, strict=True):
        p = seen[s.first : s.first + s.length]
        rows = torch.where(p >= s.start, p - s.start + s.first + held, p - low + base)
        parts.append(rows.masked_fill(p < 0, -1))
    return WindowRows(False, torch.cat(history), torch.cat(parts), write_rows, write_to)


def _compressed(
    segments: list[Segment], positions: Tensor, table: PageTable, kind: CompressedKind, cache: KVCache
) -> CompressedRows:
    ratio = table.ratio
    visible = (positions + 1) // ratio
    counts = [entries(s.end, ratio) for s in segments]
    most = max(counts)
    rows = torch.full((len(segments), most), -1)
    for b, (s, count) in enumerate(zip(segments, counts, strict=True)):
        rows[b, :count] = table.rows(s.slot, 0, count)
    needs_selection = kind[0] == "csa" and most > cache.config.index_topk
    width = 0 if needs_selection else most
    lengths = torch.tensor([s.length for s in segments])
    all_rows = rows[:, :width].repeat_interleave(lengths, dim=0)
    all_rows = all_rows.masked_fill(torch.arange(width) >= visible.unsqueeze(-1), -1)
    return CompressedRows(_compress_rows(segments, positions, table, kind), visible, rows, all_rows, most)


def _compress_rows(segments: list[Segment], positions: Tensor, table: PageTable, kind: CompressedKind) -> CompressRows:
    ratio, n = table.ratio, state_tokens(*kind)
    write_rows, write_to = _ring_write(segments, n)
    from_state = all(s.length == 1 for s in segments)
    history, items, starts, to, held = [], [], [], [], 0
    offsets = []
    for s in segments:
        # The oldest token an entry completed from here on can need, this step or later, is in the state's n tokens.
        low = max(0, s.start // ratio * ratio + ratio - n)
        offsets.append((low, held))
        if not from_state:
            history.append(s.slot * n + torch.arange(low, s.start) % n)
            held += s.start - low
    for s, (low, base) in zip(segments, offsets, strict=True):
        done = torch.arange(entries(s.start, ratio), entries(s.end, ratio))
        token = done.unsqueeze(-1) * ratio + ratio - n + torch.arange(n)  # [Ne, n], oldest first
        if from_state:
            row = s.slot * n + token % n
        else:
            row = torch.where(token >= s.start, token - s.start + s.first + held, token - low + base)
        items.append(row.masked_fill(token < 0, -1))
        starts.append(done * ratio)
        to.append(table.rows(s.slot, entries(s.start, ratio), entries(s.end, ratio)))
    return CompressRows(
        phase=positions % ratio,
        write_rows=write_rows,
        write_to=write_to,
        from_state=from_state,
        history=torch.cat(history) if history else torch.empty(0, dtype=torch.int64),
        items=torch.cat(items),
        entry_positions=torch.cat(starts),
        entry_to=torch.cat(to),
    )
