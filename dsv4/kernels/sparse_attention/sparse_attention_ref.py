"""Twin of sparse_attention."""

import torch
from torch import Tensor

from dsv4.kernels.q_norm_rope.q_norm_rope_ref import q_norm_rope_ref
from dsv4.kernels.rope.rope_ref import rope_ref
from dsv4.quant.kv import unpack_entry
from dsv4.quant.scalars import scalar

ROWS_AT_ONCE = 8  # a gathered [rows, entries, Dh] copy that stays in a CPU's cache
LOWEST = -1e30  # stands for the largest logit where nothing is visible: all the weight goes to the sink


def _gather(buffer: Tensor, rows: Tensor, absent: Tensor | None, width: int, rope_dims: int) -> Tensor:
    """buffer [..., Dh] or packed u8, rows [t, n] i64 -> [t, n, Dh] f32, zero where rows is -1."""
    flat = buffer.view(-1, buffer.shape[-1])
    held = flat.index_select(0, (rows if absent is None else rows.clamp(min=0)).flatten())
    if held.dtype == torch.uint8:
        kv = unpack_entry(held, width, rope_dims, torch.float32).view(*rows.shape, width)
    else:
        kv = held.float().view(*rows.shape, width)
    if absent is None:
        return kv
    return kv.masked_fill_(absent.unsqueeze(-1), 0)  # what lies in row 0 must not leak, not even as NaN * 0


def _attend(q: Tensor, sources: list[tuple[Tensor, Tensor]], sink: Tensor, scale: float, rope_dims: int) -> Tensor:
    rows = torch.cat([r for _, r in sources], dim=1)
    absent = rows < 0
    some_absent = bool(absent.any())
    masks = absent.split([r.shape[1] for _, r in sources], dim=1) if some_absent else [None] * len(sources)
    width = q.shape[-1]
    kv = [_gather(buffer, r, mask, width, rope_dims) for (buffer, r), mask in zip(sources, masks, strict=True)]
    keys = torch.cat(kv, dim=1) if len(kv) > 1 else kv[0]
    logits = torch.bmm(q.float(), keys.transpose(1, 2)).mul_(scalar(scale))
    if some_absent:
        logits.masked_fill_(absent.unsqueeze(1), float("-inf"))
    top = logits.amax(-1, keepdim=True).clamp_(min=LOWEST)  # of the entries alone, as in DeepSeek's kernel
    p = logits.sub_(top).exp_()
    total = p.sum(-1, keepdim=True).add_((sink - top).exp_())
    return torch.bmm(p.to(q.dtype).float(), keys).div_(total)


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
    turn: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    if turn is not None:
        q = q_norm_rope_ref(q, turn, eps)
    sources = [(local, local_rows)]
    if pool is not None and pool_rows is not None and pool_rows.shape[1]:
        sources.append((pool, pool_rows))
    sink, rope_dims = sink.view(1, -1, 1), 2 * cis.shape[1]
    outs = [
        _attend(part, [(b, rows[i * ROWS_AT_ONCE :][: len(part)]) for b, rows in sources], sink, scale, rope_dims)
        for i, part in enumerate(q.split(ROWS_AT_ONCE))
    ]
    o = torch.cat(outs) if len(outs) != 1 else outs[0]
    return rope_ref(o.to(q.dtype), cis)
