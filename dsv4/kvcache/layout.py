"""How many tokens, entries and pages a sequence needs, per kind of layer."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.config import LayerKind

CompressedKind = tuple[LayerKind, int]  # "csa" or "hca", and the ratio: layers of one kind share a page table
PAGE_ENTRIES = 64  # compressed entries (and their index keys) per page


def entries(tokens: int, ratio: int) -> int:
    """Compressed entries a sequence of `tokens` tokens has: entry i is complete once token ratio*(i+1)-1 is seen."""
    return tokens // ratio


def pages(tokens: int, ratio: int) -> int:
    """Pages of PAGE_ENTRIES entries that hold them."""
    return -(-entries(tokens, ratio) // PAGE_ENTRIES)


def entry_rows(pages: Tensor, count: int) -> Tensor:
    """[..., count] i64: pool rows of entries 0..count-1 of sequences with these pages [..., P] i64."""
    return (pages.unsqueeze(-1) * PAGE_ENTRIES + torch.arange(PAGE_ENTRIES, device=pages.device)).flatten(-2)[
        ..., :count
    ]


def state_tokens(kind: LayerKind, ratio: int) -> int:
    """Tokens the compressor's running state holds per slot: two windows for CSA, whose entries overlap, one for HCA."""
    return 2 * ratio if kind == "csa" else ratio
