"""The records of a step's row numbers, per mechanism."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dsv4.kernels.compress.rows import CompressRows


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
    rows: Tensor  # [T, w <= W] what each token sees, oldest first; -1 = nothing (its sequence is shorter)
    write_rows: Tensor  # [Tw] tokens of this step that stay in the ring
    write_to: Tensor  # [Tw]


@dataclass(frozen=True)
class CompressedRows:
    """Rows (i64) of one kind of compressed layer."""

    compress: CompressRows
    visible: Tensor  # [T] entries each token sees: (t + 1) // ratio
    pages: Tensor  # [B, P] pages of each sequence, -1 = none; entry e is pool row pages[b, e // 64] * 64 + e % 64
    sequence: Tensor  # [T] the sequence of each token, rising; -1 = a padding row
    all_rows: Tensor  # [T, E] pool rows each token sees, -1 behind them; [T, 0] when `most_visible` forces a selection
    most_visible: int  # what no token's `visible` exceeds
