"""Row numbers of a step in which some sequence brings several tokens: keys are (what came before | this step's)."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels.compress.rows import CompressRows
from dsv4.kvcache.layout import CompressedKind, entries, state_tokens
from dsv4.kvcache.pages import PageTable
from dsv4.kvcache.rows import Segment, WindowRows


def _ring_write(segments: list[Segment], n: int) -> tuple[Tensor, Tensor]:
    """Rows of this step that stay in rings of n tokens, and where: token t of slot s at s * n + t mod n."""
    kept = [(s, max(s.start, s.end - n)) for s in segments]
    rows = torch.cat([torch.arange(s.first + low - s.start, s.first + s.length) for s, low in kept])
    to = torch.cat([s.slot * n + torch.arange(low, s.end) % n for s, low in kept])
    return rows, to


def window_rows(segments: list[Segment], positions: Tensor, size: int, device: str = "cpu") -> WindowRows:
    """The rows [T, w], more than all else of a plan, are made on `device`."""
    write_rows, write_to = _ring_write(segments, size)
    width = min(size, max(s.end for s in segments))
    history, lows, held = [], [], 0
    for s in segments:
        low = max(0, s.start - size + 1)
        history.append(s.slot * size + torch.arange(low, s.start) % size)
        lows.append((low, held))
        held += s.start - low
    # of each sequence: where the step begins, and from a position to its row from there on and before
    ways = [(s.start, s.first + held - s.start, base - low) for s, (low, base) in zip(segments, lows, strict=True)]
    lengths = torch.tensor([s.length for s in segments])
    of_tokens = torch.tensor(ways).repeat_interleave(lengths, dim=0).to(device)
    start, here, before = of_tokens.unsqueeze(-1).unbind(1)  # [T, 1] each
    newest = positions.to(device).unsqueeze(-1)
    seen = (newest - size + 1).clamp_(min=0) + torch.arange(width, device=device)  # [T, w] oldest first
    rows = torch.where(seen >= start, here, before).add_(seen).masked_fill_(seen > newest, -1)
    return WindowRows(False, torch.cat(history), rows, write_rows, write_to)


def compress_rows(segments: list[Segment], positions: Tensor, table: PageTable, kind: CompressedKind) -> CompressRows:
    ratio, n = table.ratio, state_tokens(*kind)
    write_rows, write_to = _ring_write(segments, n)
    history, offsets, held = [], [], 0
    for s in segments:
        # The oldest token an entry completed from here on can need, this step or later, is in the state's n tokens.
        low = max(0, s.start // ratio * ratio + ratio - n)
        offsets.append((low, held))
        history.append(s.slot * n + torch.arange(low, s.start) % n)
        held += s.start - low
    items, starts, to = [], [], []
    for s, (low, base) in zip(segments, offsets, strict=True):
        done = torch.arange(entries(s.start, ratio), entries(s.end, ratio))
        token = done.unsqueeze(-1) * ratio + ratio - n + torch.arange(n)  # [Ne, n], oldest first
        row = torch.where(token >= s.start, token - s.start + s.first + held, token - low + base)
        items.append(row.masked_fill(token < 0, -1))
        starts.append(done * ratio)
        to.append(table.rows(s.slot, entries(s.start, ratio), entries(s.end, ratio)))
    return CompressRows(
        phase=positions % ratio,
        write_rows=write_rows,
        write_to=write_to,
        from_state=False,
        history=torch.cat(history),
        items=torch.cat(items),
        entry_positions=torch.cat(starts),
        entry_to=torch.cat(to),
    )
