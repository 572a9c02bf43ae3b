"""The window's key/value entry: norm, RoPE, FP8 of the un-rotated channels, one indexed write into the ring."""

from torch import Tensor

from dsv4.kernels.kv_append.kv_append_ref import kv_append_ref
from dsv4.kernels.op import no_kernel, op


@op("kv_append", ref=kv_append_ref, shapes={"kv": "T N : bf16 f32", "weight": "N : f32"})
def kv_append(
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
    """kv [T, Dh] (wkv's output) -> entry [T, Dh], K and V at once; also written into ring [S, W, Dh].

    weight [Dh] f32 `kv_norm`, cis [T, R/2] complex64. Rows write_rows [Tw] i64 of the result go to ring rows write_to
    [Tw] i64 (slot * W + position mod W; a chunk longer than W writes its last W rows only). `quantize`: the first Dh -
    R channels take the trained-in E4M3 rounding, groups of 64, power-of-two scales (SPEC act_quant).
    """
    raise no_kernel("kv_append")
