"""Twin of kv_append."""

import torch
from torch import Tensor

from dsv4.kernels.rms_norm.rms_norm_ref import rms_norm_ref
from dsv4.kernels.rope.rope_ref import rope_ref
from dsv4.quant import fp8, kv


def kv_entry_ref(x: Tensor, weight: Tensor, cis: Tensor, eps: float, quantize: bool, packed: bool) -> Tensor:
    """norm, RoPE, then E4M3 in groups of 64 on the channels before the rotated ones: values, or packed bytes."""
    entry, rope_dims = rope_ref(rms_norm_ref(x, weight, eps), cis), 2 * cis.shape[-1]
    if packed:
        return kv.pack_entry(entry, rope_dims)
    if quantize:
        plain = entry.shape[-1] - rope_dims
        entry[..., :plain] = fp8.act_fake_quant(entry[..., :plain], kv.GROUP)
    return entry


def some_nowhere(to: Tensor) -> bool:
    """Whether a row number of to [n] is -1. A list is the fastest way to know it of a few."""
    return min(to.tolist(), default=0) < 0


def write_ref(buffer: Tensor, to: Tensor, rows: Tensor) -> None:
    """buffer [..., X][to [n]] = rows [n, X]; -1 writes nothing."""
    if some_nowhere(to):
        written = to >= 0
        to, rows = to[written], rows[written]
    buffer.view(-1, buffer.shape[-1]).index_copy_(0, to, rows)


def kv_append_ref(
    kv: Tensor,
    weight: Tensor,
    cis: Tensor,
    ring: Tensor,
    write_rows: Tensor,
    write_to: Tensor,
    *,
    eps: float,
    quantize: bool,
) -> Tensor:
    entry = kv_entry_ref(kv, weight, cis, eps, quantize, packed=ring.dtype == torch.uint8)
    write_ref(ring, write_to, entry if len(write_rows) == len(entry) else entry[write_rows])
    return entry
