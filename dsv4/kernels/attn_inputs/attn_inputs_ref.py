"""Twin of attn_inputs: the ops it does side by side."""

from collections.abc import Sequence

from torch import Tensor

from dsv4.kernels.compress.compress_ref import compress_ref
from dsv4.kernels.compress.rows import Compression
from dsv4.kernels.kv_append.kv_append_ref import kv_append_ref
from dsv4.kernels.rms_norm.rms_norm_ref import rms_norm_ref


def attn_inputs_ref(
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
) -> tuple[Tensor, Tensor]:
    for c in compressions:
        compress_ref(*c[:8], eps=c.eps, dtype=c.dtype, index=c.keys, quantize=c.quantize)
    entry = kv_append_ref(kv, kv_weight, cis, ring, write_rows, write_to, eps=eps, quantize=quantize)
    return rms_norm_ref(qr, q_weight, eps), entry
