"""The compressor: running CSA/HCA state, pooling of completed windows, norm, RoPE, rounding, append into pages."""

from typing import Any

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.compress.compress_ref import compress_ref
from dsv4.kernels.compress.rows import Compression, CompressRows
from dsv4.kernels.kv_append.kv_append import entry_width
from dsv4.kernels.launch import contiguous, rotations, row_stride, same_device
from dsv4.kernels.loader import Kernel
from dsv4.kernels.op import op
from dsv4.quant import kv

# COMPRESS_PARAMETERS in include/dsv4/compress.cuh
ARGUMENTS = "pppppp" + "ppppppp" + "qqqqqqq" + "iiiii" + "ff" + "iiii"
_KERNEL = Kernel("compress", ARGUMENTS)
_MAX_KEY = 256


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
    64, N] in `dtype`, or u8 [P, 64, X] packed (quant/kv.py), which always rounds; cis [Ne, R/2] complex64 at each
    entry's first token. C = 2N for CSA (overlap), N for HCA. entry = norm(softmax-pooled u) then RoPE, then E4M3 in
    groups of 64 (`index=False`) or Hadamard + E2M1 in groups of 32 (`index=True`) when `quantize`. Pooling in float32
    over 2m items (CSA) or m (HCA) per channel; absent items weigh nothing. Row -1 of write_to writes nothing, entry_to
    -1 is no entry. An entry does not depend on the others. One launch, two where several tokens of a sequence come.
    """
    given = Compression(u, g, ape, weight, state, pool, rows, cis, eps, dtype, index, quantize)
    _KERNEL(u.device, *arguments_of("compress", given))


def arguments_of(name: str, given: Compression) -> list[Any]:
    """What ARGUMENTS names, checked for op `name`."""
    u, g, ape, weight, state, pool, rows, cis, eps, dtype, index, quantize = given
    tokens, channels = u.shape
    n, width, dims = rows.items.shape[1] if rows.items.dim() == 2 else 0, len(weight), 2 * cis.shape[-1]
    packed, entries = pool.dtype == torch.uint8, len(rows.entry_to)
    cis_stride = rotations(name, cis, entries, width)
    if index:
        _check_key(name, dtype, pool, width, quantize)
    else:
        entry_width(name, dtype, pool, width, dims, quantize)
    if state.dtype != torch.float32 or state.shape[-1] != 2 * channels or channels not in (width, 2 * width):
        raise KernelError(
            f"{name}: state {list(state.shape)} {state.dtype} for C = {channels} channels and entries of N = {width};"
            f" expected [S, n, {2 * channels}] float32, and C one or two times N"
        )
    buffers = {"ape": ape, "weight": weight, "state": state, "pool": pool}
    numbers = rows.phase, rows.write_rows, rows.write_to, rows.history, rows.items, rows.entry_to
    contiguous(name, **buffers, **{f"rows[{i}]": row for i, row in enumerate(numbers)})
    same_device(name, u.device, g=g, cis=cis, **buffers, items=rows.items, write_to=rows.write_to)
    counts = tokens, len(rows.write_to), len(rows.history), entries
    strides = row_stride(name, "u", u), row_stride(name, "g", g), cis_stride
    sizes = channels, n, width, dims, pool.shape[-1] if packed else 0
    how = rows.from_state, packed or quantize, index, 0 if dtype == torch.bfloat16 else 1
    tensors = u, g, ape, weight, state, pool, cis, *numbers
    return [*tensors, *counts, *strides, *sizes, eps, width**-0.5, *how]


def _check_key(name: str, dtype: torch.dtype, pool: Tensor, width: int, quantize: bool) -> None:
    packed = pool.dtype == torch.uint8
    stored = kv.index_key_bytes(width) if packed else width
    if pool.shape[-1] != stored or not ((packed and dtype == torch.bfloat16) or pool.dtype == dtype):
        raise KernelError(
            f"{name}: rows of {pool.shape[-1]} {pool.dtype} cannot hold index keys of {width} channels in {dtype}; "
            f"expected {width} {dtype}, or {kv.index_key_bytes(width)} torch.uint8 made from torch.bfloat16"
        )
    power_of_two = 32 <= width <= _MAX_KEY and width & (width - 1) == 0
    if width % 2 or width > _MAX_KEY or ((packed or quantize) and not power_of_two):
        raise KernelError(
            f"{name}: the kernel rounds index keys of 32 to {_MAX_KEY} channels, a power of two, and keeps others of "
            f"an even number up to {_MAX_KEY}; got {width}"
        )
