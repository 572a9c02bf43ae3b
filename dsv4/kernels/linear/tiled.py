"""Weights on a GPU: the order of kernels/tiles.py instead of the checkpoint's, byte for byte as many."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels import tiles
from dsv4.quant import fp8, nvfp4
from dsv4.quant.formats import e8m0_decode
from dsv4.quant.weights import FP8Weight, MXFP4Weight, NVFP4Weight, PlainWeight, Weight


@dataclass(frozen=True)
class Tiled:
    """A matrix [N, K] as the kernels multiply with it; values * alpha are the weight's.

    format       "nvfp4" (MXFP4 is cast, exactly), "fp8" or "bf16"
    tiles        u8 [ceil(N/16), ceil(K/64), bytes of a block]
    block_scale  "fp8": f32 [rows of scales, ceil(K/128)]; the matrix begins at row `first_row` of what they scale
    alpha        NVFP4's global
    exact        the values, without alpha, are BF16 numbers (FP8 with scales that are not powers of two: they are not)
    nbytes       of the weight as stored
    """

    format: str
    shape: tuple[int, int]
    tiles: Tensor
    block_scale: Tensor | None
    first_row: int
    alpha: float
    exact: bool
    nbytes: int

    def values(self) -> Tensor:
        """[N, K] float32, unpacked by PyTorch: what a twin multiplies with."""
        if self.format == "nvfp4":
            codes, scale = tiles.unpack_nvfp4(self.tiles, *self.shape)
            return nvfp4.dequantize(codes, scale, torch.ones((), device=codes.device))
        if self.block_scale is None:
            return tiles.unpack_bf16(self.tiles, *self.shape).float()
        data = tiles.unpack_fp8(self.tiles, *self.shape).float()
        row = (self.first_row + torch.arange(self.shape[0], device=data.device)) // fp8.BLOCK
        column = torch.arange(self.shape[1], device=data.device) // fp8.BLOCK
        return data * self.block_scale[row][:, column]


@dataclass(frozen=True)
class TiledRows:
    """Matrices joined row-wise; the counterpart of Dense."""

    parts: tuple[Tiled, ...]

    def matmul(self, x: Tensor, *, half: bool = False) -> Tensor:
        """x [..., K] float32 -> [..., N] float32. half: as in Dense; it changes nothing here."""
        return torch.cat([torch.nn.functional.linear(x, p.values()).mul_(p.alpha) for p in self.parts], dim=-1)


def tiled(weight: Weight) -> Tiled:
    """Pack weight [N, K]; the checkpoint's form is not kept. Synchronises (a global becomes a number of the host)."""
    (packed,) = tiled_groups(weight, 1)
    return packed


def tiled_groups(weight: Weight, groups: int) -> list[Tiled]:
    """Rows of weight [N, K] in equal groups, each packed by itself."""
    rows, columns = weight.shape[-2] // groups, weight.shape[-1]
    stored = weight.nbytes // groups
    alpha, exact, scale = 1.0, True, None
    if isinstance(weight, MXFP4Weight):
        weight = _nvfp4_of(weight)
    if isinstance(weight, FP8Weight) and rows % tiles.ROWS and groups > 1:
        weight = _plain_of(weight)  # a tile would straddle two rows of scales
    if isinstance(weight, NVFP4Weight):
        format, alpha = "nvfp4", float(weight.global_scale)
        split = (part.unflatten(0, (groups, rows)) for part in (weight.codes, weight.scale))
        packed = tiles.pack_nvfp4(*split)
    elif isinstance(weight, FP8Weight):
        format = "fp8"
        scale = weight.scale if weight.scale.dtype == torch.float32 else e8m0_decode(weight.scale)
        exact = bool((torch.frexp(scale)[0] == 0.5).all())
        packed = tiles.pack_fp8(weight.data.unflatten(0, (groups, rows)))
    else:
        format, plain = "bf16", _plain_of(weight)
        packed = tiles.pack_bf16(plain.data.unflatten(0, (groups, rows)))
    return [Tiled(format, (rows, columns), packed[g], scale, g * rows, alpha, exact, stored) for g in range(groups)]


def _nvfp4_of(weight: MXFP4Weight) -> NVFP4Weight:
    cast, exact = NVFP4Weight.from_mxfp4(weight)
    if not exact:
        raise KernelError(
            f"an MXFP4 weight of shape {list(weight.shape)} has scales more than 17 octaves apart, which NVFP4 cannot "
            "hold exactly; load it with weights='nvfp4' to requantise it, or run on device='cpu'"
        )
    return cast


def _plain_of(weight: Weight) -> PlainWeight:
    if isinstance(weight, PlainWeight) and weight.format == "bf16":
        return weight
    values = weight.dequantize(torch.float32)
    narrow = values.bfloat16()
    if not torch.equal(narrow.float(), values):
        raise KernelError(
            f"a {weight.format} weight of shape {list(weight.shape)} holds values that BF16 does not; the GPU "
            "multiplies BF16: store it as BF16, or run on device='cpu'"
        )
    return PlainWeight(narrow)
