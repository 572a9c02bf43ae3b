"""What the blocks of an mHC kernel leave for its second launch (include/dsv4/mhc.cuh)."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.errors import KernelError

COLUMNS, WIDEST = 64, 8192  # of a block; of a token


def shares_of(name: str, h: Tensor, rows: int) -> Tensor:
    """h [T, M, D] -> memory [T, D / 64, rows + 1] f32: a block's part of a token's mixes and sum of squares."""
    tokens, _, width = h.shape
    if width > WIDEST:
        raise KernelError(f"{name}: D = {width}; the kernel is written for at most {WIDEST}")
    return torch.empty(tokens, -(-width // COLUMNS), rows + 1, dtype=torch.float32, device=h.device)
