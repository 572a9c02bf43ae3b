"""The window's key/value entry: norm, RoPE, FP8 of the un-rotated channels, one indexed write into the ring."""

from typing import Any

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.kv_append.kv_append_ref import kv_append_ref
from dsv4.kernels.launch import contiguous, dtype_code, result, rotations, row_stride, same_device
from dsv4.kernels.loader import Kernel
from dsv4.kernels.op import op
from dsv4.quant import kv as formats

ARGUMENTS = "ppppppp" + "qqqq" + "iii" + "f" + "ii"  # KV_APPEND_PARAMETERS in include/dsv4/kv_append.cuh
_KERNEL = Kernel("kv_append", ARGUMENTS)
MAX_CHANNELS = 1024


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
    out: Tensor | None = None,
) -> Tensor:
    """kv [T, Dh] (wkv's output) -> entry [T, X], K and V at once; also written into ring [S, W, X].

    weight [Dh] f32 `kv_norm`, cis [T, R/2] complex64. Rows write_rows [Tw] i64 of the result, rising, go to ring rows
    write_to [Tw] i64 (slot * W + position mod W; a chunk longer than W writes its last W rows only), -1 nowhere.
    `quantize`: the first Dh - R channels take the trained-in E4M3 rounding, groups of 64, power-of-two scales (SPEC
    act_quant). X = Dh and kv's dtype, or u8 and X = quant.kv.entry_bytes(Dh, R): packed, which always rounds. A row
    does not depend on the others. One launch.
    """
    out, arguments = arguments_of("kv_append", kv, weight, cis, ring, write_rows, write_to, eps, quantize, out)
    _KERNEL(kv.device, *arguments)
    return out


def arguments_of(
    name: str,
    kv: Tensor,
    weight: Tensor,
    cis: Tensor,
    ring: Tensor,
    write_rows: Tensor,
    write_to: Tensor,
    eps: float,
    quantize: bool,
    out: Tensor | None,
) -> tuple[Tensor, list[Any]]:
    """The result and what ARGUMENTS names, checked for op `name`."""
    rows, n = kv.shape
    packed = ring.dtype == torch.uint8
    cis_stride = rotations(name, cis, rows, n)
    dims = 2 * cis.shape[1]
    width = entry_width(name, kv.dtype, ring, n, dims, quantize)
    contiguous(name, weight=weight, ring=ring, write_rows=write_rows, write_to=write_to)
    same_device(name, kv.device, weight=weight, cis=cis, ring=ring, write_rows=write_rows, write_to=write_to)
    out = result(name, out, (rows, width), ring.dtype, kv.device)
    tensors = kv, weight, cis, ring, write_rows, write_to, out
    sizes = rows, len(write_to), row_stride(name, "kv", kv), cis_stride, n, dims, width if packed else 0
    return out, [*tensors, *sizes, eps, quantize, dtype_code(name, "kv", kv)]


def entry_width(name: str, dtype: torch.dtype, buffer: Tensor, n: int, dims: int, quantize: bool) -> int:
    """Elements of a row of `buffer`, which holds entries of n channels in `dtype` or packed; checked."""
    packed = buffer.dtype == torch.uint8
    width = formats.entry_bytes(n, dims) if packed else n
    if buffer.shape[-1] != width or not (packed or buffer.dtype == dtype):
        raise KernelError(
            f"{name}: rows of {buffer.shape[-1]} {buffer.dtype} cannot hold entries of {n} channels in {dtype}; "
            f"expected {width} {torch.uint8 if packed else dtype}"
        )
    if packed and dtype != torch.bfloat16:
        raise KernelError(f"{name}: packed entries are made from torch.bfloat16, got {dtype}")
    if n > MAX_CHANNELS or n % 2 or ((packed or quantize) and (n - dims) % formats.GROUP):
        raise KernelError(
            f"{name}: the kernel takes an even number of channels up to {MAX_CHANNELS} and rounds groups of "
            f"{formats.GROUP}; got {n}, of which {n - dims} not rotated"
        )
    return width
