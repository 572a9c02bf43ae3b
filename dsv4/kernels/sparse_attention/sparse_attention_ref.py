"""Twin of sparse_attention."""

import torch
from torch import Tensor

from dsv4.kernels.rope.rope_ref import rope_ref

ROWS_AT_ONCE = 64  # bounds the gathered [rows, entries, Dh] copy on long prefills


def _gather(buffer: Tensor, rows: Tensor) -> Tensor:
    """buffer [..., Dh], rows [t, n] i64 -> [t, n, Dh] f32, zero where rows is -1."""
    flat = buffer.view(-1, buffer.shape[-1])
    kv = flat.index_select(0, rows.clamp(min=0).flatten()).float().view(*rows.shape, -1)
    absent = rows < 0
    # What lies in row 0 must not leak into an absent one, not even as NaN * 0.
    return kv.masked_fill_(absent.unsqueeze(-1), 0) if absent.any() else kv


def _attend(q: Tensor, kv: Tensor, absent: Tensor, sink: Tensor, scale: float) -> Tensor:
    logits = torch.bmm(q.float(), kv.transpose(1, 2)) * scale
    logits.masked_fill_(absent.unsqueeze(1), float("-inf"))
    top = torch.maximum(logits.amax(-1, keepdim=True), sink)
    p = torch.exp(logits.sub_(top))
    total = p.sum(-1, keepdim=True) + torch.exp(sink - top)
    return torch.bmm(p.to(q.dtype).float(), kv) / total


def sparse_attention_ref(
    q: Tensor,
    local: Tensor,
    local_rows: Tensor,
    pool: Tensor | None,
    pool_rows: Tensor | None,
    sink: Tensor,
    cis: Tensor,
    *,
    scale: float,
) -> Tensor:
    sink = sink.view(1, -1, 1)
    outs = []
    for first in range(0, len(q), ROWS_AT_ONCE):
        part = slice(first, first + ROWS_AT_ONCE)
        rows = local_rows[part]
        kv = _gather(local, rows)
        if pool is not None and pool_rows is not None and pool_rows.shape[1]:
            more = pool_rows[part]
            kv = torch.cat([kv, _gather(pool, more)], dim=1)
            rows = torch.cat([rows, more], dim=1)
        outs.append(_attend(q[part], kv, rows < 0, sink, scale))
    o = torch.cat(outs) if len(outs) != 1 else outs[0]
    return rope_ref(o.to(q.dtype), cis, inverse=True)
