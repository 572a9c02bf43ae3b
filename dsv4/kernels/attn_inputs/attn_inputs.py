"""What a decode step makes of attention's input projections before anything can attend."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.attn_inputs.attn_inputs_ref import attn_inputs_ref
from dsv4.kernels.compress.compress import ARGUMENTS as COMPRESS
from dsv4.kernels.compress.compress import arguments_of as compress_arguments
from dsv4.kernels.compress.compress import compress
from dsv4.kernels.compress.rows import Compression
from dsv4.kernels.kv_append.kv_append import ARGUMENTS as KV_APPEND
from dsv4.kernels.kv_append.kv_append import arguments_of as entry_arguments
from dsv4.kernels.kv_append.kv_append import kv_append
from dsv4.kernels.launch import contiguous, result, row_stride, same_device
from dsv4.kernels.loader import Kernel
from dsv4.kernels.op import op
from dsv4.kernels.rms_norm.rms_norm import rms_norm

_MOST = 2  # a compressor, and that of an indexer
_MAX_CHANNELS = 512  # of an entry
_KERNEL = Kernel("attn_inputs", "pppqqif" + KV_APPEND + _MOST * COMPRESS)


@op(
    "attn_inputs",
    ref=attn_inputs_ref,
    shapes={"qr": "T Q : bf16 f32", "q_weight": "Q : f32", "kv": "T N : bf16 f32", "kv_weight": "N : f32"},
)
def attn_inputs(
    qr: Tensor,
    q_weight: Tensor,
    kv: Tensor,
    kv_weight: Tensor,
    cis: Tensor,
    ring: Tensor,
    write_rows: Tensor,
    write_to: Tensor,
    compressions: Sequence[Compression],
    *,
    eps: float,
    quantize: bool,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """rms_norm(qr, q_weight), kv_append(kv, kv_weight, ...) and compress(...) of each compression, side by side.

    qr [T, Q], kv [T, N] bf16|f32: outputs of `wq_a` and `wkv`; the rest as those ops say -> qr [T, Q] normed, and the
    entries [T, X], also written into the ring; compressions write into their states and pools.

    On a GPU one launch in a decode step in BF16, where each result has the bits that its op by itself gives it; for a
    chunk, in float32, or for entries of more than 512 channels the launches of those ops.
    """
    if not _together(qr, kv, compressions):
        entry = kv_append(
            kv,
            kv_weight,
            cis,
            ring,
            write_rows,
            write_to,
            eps=eps,
            quantize=quantize,
            out=None if out is None else out[1],
        )
        for c in compressions:
            compress(*c[:8], eps=c.eps, dtype=c.dtype, index=c.keys, quantize=c.quantize)
        return rms_norm(qr, q_weight, eps, out=None if out is None else out[0]), entry
    contiguous("attn_inputs", q_weight=q_weight)
    same_device("attn_inputs", kv.device, qr=qr, q_weight=q_weight)
    given = out or (None, None)
    normed = result("attn_inputs", given[0], tuple(qr.shape), qr.dtype, qr.device)
    entry, append = entry_arguments(
        "attn_inputs", kv, kv_weight, cis, ring, write_rows, write_to, eps, quantize, given[1]
    )
    arguments: list[Any] = [qr, q_weight, normed, len(qr), row_stride("attn_inputs", "qr", qr), qr.shape[1], eps]
    arguments += append
    for i in range(_MOST):
        absent = [None if letter == "p" else 0 for letter in COMPRESS]
        arguments += compress_arguments("attn_inputs", compressions[i]) if i < len(compressions) else absent
    _KERNEL(kv.device, *arguments)
    return normed, entry


def _together(qr: Tensor, kv: Tensor, compressions: Sequence[Compression]) -> bool:
    """Is this what one launch takes: at most one compression into entries, then at most one into index keys?"""
    kinds = [c.keys for c in compressions]
    return (
        qr.dtype == kv.dtype == torch.bfloat16
        and kv.shape[1] <= _MAX_CHANNELS
        and kinds in ([], [False], [False, True])
        and all(c.rows.from_state and len(c.weight) <= _MAX_CHANNELS for c in compressions)
    )
