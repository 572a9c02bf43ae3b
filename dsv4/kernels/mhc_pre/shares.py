"""What the blocks of an mHC kernel leave for its second launch (include/dsv4/mhc.cuh)."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.errors import KernelError

COLUMNS, WIDEST = 64, 8192  # of a block; of a token
PER_WORD = 3  # sums in 16 bytes


def shares_of(name: str, h: Tensor, sums: int) -> Tensor:
    """h [T, M, D] -> memory [T, sums / 3, D / 64, 4] f32: a block's part of a token's sums, three to a word."""
    tokens, _, width = h.shape
    if width > WIDEST:
        raise KernelError(f"{name}: D = {width}; the kernel is written for at most {WIDEST}")
    return torch.empty(tokens, -(-sums // PER_WORD), -(-width // COLUMNS), 4, dtype=torch.float32, device=h.device)
