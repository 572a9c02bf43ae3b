"""Twin of kv_append."""

from torch import Tensor

from dsv4.kernels.rms_norm.rms_norm_ref import rms_norm_ref
from dsv4.kernels.rope.rope_ref import rope_ref
from dsv4.quant import fp8


def kv_entry_ref(kv: Tensor, weight: Tensor, cis: Tensor, eps: float, quantize: bool) -> Tensor:
    """norm, RoPE, then E4M3 in groups of 64 on the channels before the rotated ones."""
    entry = rope_ref(rms_norm_ref(kv, weight, eps), cis)
    if quantize:
        plain = entry.shape[-1] - 2 * cis.shape[-1]
        entry[..., :plain] = fp8.act_fake_quant(entry[..., :plain], 64)
    return entry


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
    entry = kv_entry_ref(kv, weight, cis, eps, quantize)
    ring.view(-1, ring.shape[-1])[write_to] = entry if len(write_rows) == len(entry) else entry[write_rows]
    return entry
