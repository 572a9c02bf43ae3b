"""Rows to the ranks that have their experts (`ep-a2a`).

Every rank answers for its part of the rows and sends each of them once to every rank that has one of its experts. What
comes back is a part of the sum after the experts, which is added up over ranks as with any other mapping.

Bytes that leave a rank, for T rows of D in bfloat16 on N ranks, each a factor of (N - 1) / N x T x D: 6 for the sum
(Comm.add_apart), whatever the mapping; here 2 p more, where p is the part of the rows that need a given rank (0.98 of 2
ranks, 0.82 of 4, 0.55 of 8 for 6 of 256 experts at random). Nothing is saved by them as long as every rank has all rows
anyway, which attention divided by heads needs. So `ep` is the faster way by this count; an exchange pays once ranks
divide attention by sequences: then rows lie on one rank only, the sum need not be told to all, and no rank holds the
cache of the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.parallel.mesh import Mesh


def dispatch(x: Tensor, ids: Tensor, experts: int, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """x [T, D] and the experts of its rows, ids [T, K] i64, alike on every rank -> (rows [n] i64, x[rows]): in rising
    order those that need one of this rank's experts, as sent by the ranks that answer for them. The host waits.
    """
    rank, size = mesh.rank, mesh.size
    ranks = torch.arange(size, device=ids.device)
    needs = (ids.unsqueeze(-1) // (experts // size) == ranks).any(dim=1)  # [T, N]
    cuts = [len(x) * r // size for r in range(size + 1)]
    before = torch.cat([torch.zeros_like(ranks).unsqueeze(0), needs.cumsum(0)])[cuts]
    counts = before.diff(dim=0).tolist()  # rows that one rank sends to another
    mine = slice(cuts[rank], cuts[rank + 1])
    _, order = needs[mine].T.nonzero(as_tuple=True)  # by rank, then by row
    sent = x[mine].index_select(0, order)
    rows = needs[:, rank].nonzero().flatten()
    return rows, mesh.comm.exchange(sent, counts[rank], [to[rank] for to in counts])
