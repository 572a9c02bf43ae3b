"""Row numbers of a decode step: one token per sequence, so every key is in ring, state or pool once it is written."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels.compress.rows import CompressRows
from dsv4.kvcache.layout import CompressedKind, state_tokens
from dsv4.kvcache.pages import PageTable
from dsv4.kvcache.rows import Segment, WindowRows

NONE = torch.empty(0, dtype=torch.int64)


def window_rows(segments: list[Segment], positions: Tensor, size: int) -> WindowRows:
    bases, every = _slots(segments, size)
    width = min(size, max(s.end for s in segments))
    seen = (positions - size + 1).clamp_(min=0).unsqueeze(-1) + torch.arange(width)  # [T, w] oldest first
    rows = bases.unsqueeze(-1) + seen.remainder(size)
    if min(s.end for s in segments) < width:
        rows.masked_fill_(seen > positions.unsqueeze(-1), -1)
    return WindowRows(True, NONE, rows, every, bases + positions.remainder(size))


def compress_rows(segments: list[Segment], positions: Tensor, table: PageTable, kind: CompressedKind) -> CompressRows:
    ratio, n = table.ratio, state_tokens(*kind)
    bases, every = _slots(segments, n)
    write_to = bases + positions.remainder(n)
    done = [s for s in segments if s.end % ratio == 0]
    if not done:
        return CompressRows(positions % ratio, every, write_to, True, NONE, NONE, NONE, NONE)
    last = torch.tensor([s.start for s in done]).unsqueeze(-1)
    token = last - torch.arange(n - 1, -1, -1)  # [Ne, n] oldest first
    items = (_slots(done, n)[0].unsqueeze(-1) + token.remainder(n)).masked_fill_(token < 0, -1)
    to = torch.tensor([table.row(s.slot, s.start // ratio) for s in done])
    return CompressRows(
        phase=positions % ratio,
        write_rows=every,
        write_to=write_to,
        from_state=True,
        history=NONE,
        items=items,
        entry_positions=last.squeeze(-1) + 1 - ratio,
        entry_to=to,
    )


def _slots(segments: list[Segment], size: int) -> tuple[Tensor, Tensor]:
    """[T] first row of each sequence's slot in storage of `size` rows per slot, and [T] all rows of the step."""
    return torch.tensor([s.slot * size for s in segments]), torch.arange(len(segments))
