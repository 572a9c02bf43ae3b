"""The ranks whose parts make up a sublayer's output, as mhc_seam and mhc_last add them up (include/dsv4/mhc.cuh)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.launch import same_dtype
from dsv4.kernels.mhc_pre.shares import WIDEST

ROWS, COLUMNS, RANKS = 128, 7168, 8  #: that an exchange has room for
_INBOX_ROWS = 64  # of peers.cuh, where they are shared out


def inbox_words(size: int) -> int:
    """int64 of one rank's inbox [2, size, 64, WIDEST]: what each rank tells it, of this turn and the last."""
    return 2 * size * _INBOX_ROWS * WIDEST


@dataclass(frozen=True)
class Peers:
    """All ranks, this one among them.

    inboxes: the addresses of their inboxes, zeros at first, each in memory that all of them may write. turns i32, in
    seams [ROWS]: how often each row was added up, zeros at first and on this rank's device alone. Every rank calls for
    the same rows in the same order. total: what they all give together, by other means, for the twin; in seams the sum
    y [T, D] f32 -> [T, D] f32.
    """

    rank: int
    inboxes: ctypes.Array[ctypes.c_uint64]
    turns: Tensor
    total: Callable[[Tensor], Tensor]

    @staticmethod
    def of(
        rank: int,
        addresses: Sequence[int],
        device: torch.device,
        total: Callable[[Tensor], Tensor],
        *,
        turns: int = ROWS,
    ) -> Peers:
        """addresses: those of the inboxes, in the order of ranks. turns: how many are counted."""
        inboxes = (ctypes.c_uint64 * len(addresses))(*addresses)
        return Peers(rank, inboxes, torch.zeros(turns, dtype=torch.int32, device=device), total)

    @property
    def size(self) -> int:
        return len(self.inboxes)


def check_part(name: str, y: Tensor, h: Tensor, peers: Peers | None) -> None:
    """Whether the op's y [T, D] is what leaves a site of streams h: whole, or with `peers` a rank's part."""
    if peers is None:
        same_dtype(name, "y", y, "h", h)
    elif y.dtype != torch.float32 or len(y) > ROWS or y.shape[1] > COLUMNS or peers.size > RANKS:
        raise KernelError(
            f"{name}: 'y' is {list(y.shape)} {y.dtype} of {peers.size} ranks; parts of a sum are float32, of at most "
            f"{ROWS} rows, {COLUMNS} columns and {RANKS} ranks"
        )


def meeting(peers: Peers | None) -> tuple[int | None, Tensor | None, int, int]:
    """What a launcher hands on: the address of the inboxes' addresses, turns, rank, size."""
    if peers is None:
        return None, None, 0, 1
    return ctypes.addressof(peers.inboxes), peers.turns, peers.rank, peers.size
