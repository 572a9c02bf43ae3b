"""What a decode step of B rows needs to know, at fixed shapes: the results of step_plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """One kind of compressed layer. `overlap`: its entries pool two windows of `ratio` tokens (CSA), else one (HCA)."""

    ratio: int
    overlap: bool
    place: int  # row of the frequencies that its layers turn by
    pages: int  # P: pages of a sequence of the longest length planned for
    width: int  # E: columns of `all_rows`, at most 64 * P; 0 where entries are always selected

    @property
    def items(self) -> int:
        """Tokens pooled into an entry, and tokens in the state of a slot."""
        return 2 * self.ratio if self.overlap else self.ratio


@dataclass(frozen=True)
class KindRows:
    """Rows (i64) of one kind. Fields as in CompressRows and CompressedRows; one entry per row, completed or not."""

    phase: Tensor  # [B]
    write_to: Tensor  # [B]
    items: Tensor  # [B, n]
    entry_positions: Tensor  # [B]
    entry_to: Tensor  # [B]; -1: the row's token completes no entry
    visible: Tensor  # [B]
    pages: Tensor  # [B, P]
    all_rows: Tensor  # [B, E]
    cis: Tensor  # [B, R/2, 2] f32: cos and sin at entry_positions


@dataclass(frozen=True)
class StepRows:
    window_rows: Tensor  # [B, W] i64
    window_to: Tensor  # [B] i64
    sequence: Tensor  # [B] i64: b, or -1 for a padding row
    token_cis: Tensor  # [n, B, R/2, 2] f32: cos and sin of position * frequency
    back_cis: Tensor  # [n, B, R/2, 2] f32: their conjugates
    kinds: tuple[KindRows, ...]

    @staticmethod
    def empty(batch: int, window: int, freqs: Tensor, kinds: tuple[Kind, ...]) -> StepRows:
        """Memory for the results, on the device of freqs [n, R/2]."""
        n, half = freqs.shape

        def rows(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int64, device=freqs.device)

        def turns(*shape: int) -> Tensor:
            return torch.empty((*shape, half, 2), dtype=torch.float32, device=freqs.device)

        def of(kind: Kind) -> KindRows:
            return KindRows(
                phase=rows(batch),
                write_to=rows(batch),
                items=rows(batch, kind.items),
                entry_positions=rows(batch),
                entry_to=rows(batch),
                visible=rows(batch),
                pages=rows(batch, kind.pages),
                all_rows=rows(batch, kind.width),
                cis=turns(batch),
            )

        return StepRows(
            rows(batch, window),
            rows(batch),
            rows(batch),
            turns(n, batch),
            turns(n, batch),
            tuple(of(kind) for kind in kinds),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        own = (self.window_rows, self.window_to, self.sequence, self.token_cis, self.back_cis)
        return own + tuple(tensor for kind in self.kinds for tensor in vars(kind).values())
