"""Twin of compress: per-channel softmax pooling of a window's tokens into one entry."""

import torch
from torch import Tensor

from dsv4.kernels.compress.rows import CompressRows
from dsv4.kernels.index_query.index_query_ref import index_rounding_ref
from dsv4.kernels.kv_append.kv_append_ref import kv_entry_ref, some_nowhere, write_ref
from dsv4.kernels.rms_norm.rms_norm_ref import rms_norm_ref
from dsv4.kernels.rope.rope_ref import rope_ref
from dsv4.quant import kv
from dsv4.quant.hadamard import hadamard


def pool_ref(source: Tensor, items: Tensor, width: int) -> Tensor:
    """source [N, 2*C] f32 = (u | g); items [Ne, n] i64 rows of it, -1 = absent -> [Ne, width] f32.

    C = 2 * width (CSA): the older half of the items gives its channels [:width], the newer half [width:]. C = width:
    HCA.
    """
    channels = source.shape[-1] // 2
    absent = (items < 0).unsqueeze(-1)
    u, g = source[items.clamp(min=0)].split(channels, dim=-1)
    u, g = u.masked_fill(absent, 0), g.masked_fill(absent, float("-inf"))
    if channels == 2 * width:
        half = items.shape[1] // 2
        u = torch.cat([u[:, :half, :width], u[:, half:, width:]], dim=1)
        g = torch.cat([g[:, :half, :width], g[:, half:, width:]], dim=1)
    return (torch.softmax(g, dim=1) * u).sum(1)


def compress_ref(
    u: Tensor,
    g: Tensor,
    ape: Tensor,
    weight: Tensor,
    state: Tensor,
    pool: Tensor,
    rows: CompressRows,
    cis: Tensor,
    *,
    eps: float,
    dtype: torch.dtype,
    index: bool,
    quantize: bool,
) -> None:
    fresh = torch.cat([u, ape.index_select(0, rows.phase).add_(g)], dim=-1)
    flat = state.view(-1, state.shape[-1])
    source = flat if rows.from_state else torch.cat([flat[rows.history], fresh])
    write_ref(flat, rows.write_to, fresh if len(rows.write_rows) == len(fresh) else fresh[rows.write_rows])
    items, to = rows.items, rows.entry_to
    if some_nowhere(to):
        done = to >= 0
        items, to, cis = items[done], to[done], cis[done]
    if not len(to):
        return
    pooled = pool_ref(source, items, len(weight)).to(dtype)
    packed = pool.dtype == torch.uint8
    if index:
        key = rope_ref(rms_norm_ref(pooled, weight, eps), cis)
        entry = kv.pack_index_key(hadamard(key)) if packed else index_rounding_ref(key, quantize)
    else:
        entry = kv_entry_ref(pooled, weight, cis, eps, quantize, packed)
    pool.view(-1, pool.shape[-1])[to] = entry
