"""Which rows one step's compression reads and writes; the same for every layer of one ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class CompressRows:
    """Row numbers (int64) for a step of T tokens that completes Ne entries of ratio m.

    The state ring holds `n` tokens per slot (2m for CSA, whose entries overlap; m for HCA), token t at slot * n + t
    mod n.
    """

    phase: Tensor  # [T] t mod m: the row of `ape`
    write_rows: Tensor  # [Tw] tokens of this step that stay in the state
    write_to: Tensor  # [Tw] their rows in the flattened state [S*n, ...]
    from_state: bool  # every token an entry needs is in the state once this step's tokens are written (decode)
    history: (
        Tensor  # [Nh] state rows read before writing; entries index (history | this step's tokens) unless from_state
    )
    items: Tensor  # [Ne, n] rows pooled into each entry, oldest first; -1 = before the sequence began
    entry_positions: Tensor  # [Ne] position of each entry's first token (its RoPE position)
    entry_to: Tensor  # [Ne] rows in the flattened page pool [P*64, ...]


class Compression(NamedTuple):
    """The arguments of one call of compress."""

    u: Tensor
    g: Tensor
    ape: Tensor
    weight: Tensor
    state: Tensor
    pool: Tensor
    rows: CompressRows
    cis: Tensor
    eps: float
    dtype: torch.dtype
    keys: bool  # the op's `index`
    quantize: bool
