"""Twin of sparse_attention."""

import torch
from torch import Tensor

from dsv4.kernels.rope.rope_ref import rope_ref

ROWS_AT_ONCE = 64  # bounds the gathered [rows, entries, Dh] copy on long prefills


def _rows_ref(q: Tensor, kv: Tensor, absent: Tensor, sink: Tensor, scale: float) -> Tensor:
    kv = kv.float().masked_fill(
        absent.unsqueeze(-1), 0
    )  # an absent row must not leak what lies there, not even as NaN * 0
    logits = torch.bmm(q.float(), kv.transpose(1, 2)) * scale
    logits = logits.masked_fill(absent.unsqueeze(1), float("-inf"))
    sink = sink.view(1, -1, 1)
    top = torch.maximum(logits.amax(-1, keepdim=True), sink)
    p = torch.exp(logits - top)
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
    local = local.view(-1, q.shape[-1])
    outs = []
    for first in range(0, len(q), ROWS_AT_ONCE):
        part = slice(first, first + ROWS_AT_ONCE)
        rows = local_rows[part]
        kv = local[rows.clamp(min=0)]
        if pool is not None and pool_rows is not None and pool_rows.shape[1]:
            more = pool_rows[part]
            kv = torch.cat([kv, pool.view(-1, q.shape[-1])[more.clamp(min=0)]], dim=1)
            rows = torch.cat([rows, more], dim=1)
        outs.append(_rows_ref(q[part], kv, rows < 0, sink, scale))
    o = torch.cat(outs) if len(outs) != 1 else outs[0]
    return rope_ref(o.to(q.dtype), cis, inverse=True)
