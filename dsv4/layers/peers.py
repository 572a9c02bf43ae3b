"""With whom a layer exchanges a few rows without waiting for all ranks: in words, in memory that all may write."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsv4.kernels.mhc_seam.peers import RANKS, ROWS, Peers
from dsv4.parallel.mesh import Mesh


def peers_among(tp: Mesh, words: int, total: Callable[[Tensor], Tensor], *, turns: int = ROWS) -> Peers | None:
    """words: of each rank's inbox, made here. total, turns: see Peers. None where ranks cannot write one another's
    memory.
    """
    inboxes = tp.inboxes(words) if tp.size <= RANKS else None
    return None if inboxes is None else Peers.of(tp.rank, inboxes, torch.device(tp.device), total, turns=turns)
