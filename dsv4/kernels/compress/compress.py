"""The compressor: running CSA/HCA state, pooling of completed windows, norm, RoPE, rounding, append into pages."""

import torch
from torch import Tensor

from dsv4.kernels.compress.compress_ref import compress_ref
from dsv4.kernels.compress.rows import CompressRows
from dsv4.kernels.op import no_kernel, op


@op("compress", ref=compress_ref, shapes={"u": "T C : f32", "g": "T C : f32", "ape": "m C : f32", "weight": "N : f32"})
def compress(
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
    """Write T tokens' (u | g + ape) into the state and append every entry they complete to the pool.

    u, g [T, C] f32 (wkv x, wgate x); ape [m, C] f32; weight [N] f32 `compressor.norm`; state [S, n, 2C] f32; pool [P,
    64, N] in `dtype`; cis [Ne, R/2] complex64 at each entry's first token. C = 2N for CSA (overlap), N for HCA. entry
    = norm(softmax-pooled u) then RoPE, then E4M3 in groups of 64 (`index=False`) or Hadamard + E2M1 in groups of 32
    (`index=True`) when `quantize`. Pooling in float32 over 2m items (CSA) or m (HCA) per channel; absent items weigh
    nothing.
    """
    raise no_kernel("compress")
