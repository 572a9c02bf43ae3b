"""FP8 E4M3 with power-of-two scales: 128x128 weight blocks, activation groups, and the fake quantisers of the model.

Activation rule (SPEC 2.0), per row and group:
    a = max(amax, 1e-4);  scale = 2^ceil(log2(a * float32(1/448)));  q = E4M3(clamp(x / scale, +-448))
with the ceil taken from the float32 product's bits: its exponent, plus one if a mantissa bit is set.
x / scale can exceed 448 only by the rounding of that product, which the cast rounds away, so no clamp is spent on it.

A ragged last group is a group of fewer columns with its own scale. T = 0 rows give empty results.
A zero group takes the floor's scale, 2^-22, and gives zeros with their signs.
A value within half a step of 2^128 rounds up to it and so, being past float32's largest, becomes Inf.
NaN or Inf: the element comes back NaN and its group means nothing; check=True raises KernelError instead
(and synchronises).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4.quant import mxfp4
from dsv4.quant.formats import E4M3_MAX, as_float32, check_finite, e4m3_decode, e8m0_decode, pow2_ceil, round_magnitude_
from dsv4.quant.scalars import scalar

BLOCK = 128
ACT_AMAX_FLOOR = 1e-4
BLOCK_AMAX_FLOOR = E4M3_MAX * 2.0**-126
_INV_MAX = scalar(1.0 / E4M3_MAX)


def quantize_block(x: Tensor, block: int = BLOCK, *, check: bool = True, name: str = "x") -> tuple[Tensor, Tensor]:
    """Quantise a weight x [..., N, K] to (data e4m3 [..., N, K], e8m0 uint8 [..., ceil(N/block), ceil(K/block)]).

    scale = 2^ceil(log2(max(amax, 448 * 2^-126) / 448)); a zero block gets 2^-126. Blocks at a ragged edge are smaller.
    Raises KernelError naming `name` on NaN or Inf unless check=False (which does not synchronise).
    """
    if check:
        check_finite(x, name)
    tiles = _tiles(as_float32(x, name), block)
    scale = pow2_ceil(tiles.abs().amax(dim=(-3, -1)).clamp_(min=BLOCK_AMAX_FLOOR).mul_(_INV_MAX))
    data = (tiles / scale[..., :, None, :, None]).to(torch.float8_e4m3fn)
    return _untile(data, x.shape), scale.to(torch.float8_e8m0fnu).view(torch.uint8)


def dequantize_block(data: Tensor, scale: Tensor, block: int = BLOCK, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values [..., N, K] of data e4m3 [..., N, K] and scale [..., ceil(N/block), ceil(K/block)].

    The scale is E8M0 bytes (uint8) or float32 factors. Exact in float64; in float32 and bfloat16 exact for powers of
    two (short of underflow), while other factors round.
    """
    work = torch.float64 if dtype == torch.float64 else torch.float32
    factor = (e8m0_decode(scale) if scale.dtype == torch.uint8 else scale).to(work)
    tiles = _tiles(e4m3_decode(data).to(work), block) * factor[..., :, None, :, None]
    return _untile(tiles, data.shape).to(dtype)


def _tiles(x: Tensor, block: int) -> Tensor:
    rows, columns = x.shape[-2:]
    if rows % block or columns % block:
        x = F.pad(x, (0, -columns % block, 0, -rows % block))
    return x.unflatten(-1, (x.shape[-1] // block, block)).unflatten(-3, (x.shape[-2] // block, block))


def _untile(tiles: Tensor, shape: torch.Size) -> Tensor:
    return tiles.flatten(-2).flatten(-3, -2)[..., : shape[-2], : shape[-1]].contiguous()


def _groups(x: Tensor, group: int) -> Tensor:
    columns = x.shape[-1]
    if columns % group:
        x = F.pad(x, (0, -columns % group))
    return x.unflatten(-1, (x.shape[-1] // group, group))


def _act_scale(magnitude: Tensor) -> Tensor:
    return pow2_ceil(magnitude.amax(dim=-1, keepdim=True).clamp_(min=ACT_AMAX_FLOOR).mul_(_INV_MAX))


def act_quant(x: Tensor, group: int = BLOCK, *, check: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise activations x [..., K] float32 or bfloat16 to (q e4m3 [..., K], scale float32 [..., ceil(K/group)])."""
    if check:
        check_finite(x)
    groups = _groups(as_float32(x), group)
    scale = _act_scale(groups.abs())
    q = (groups / scale).to(torch.float8_e4m3fn)
    return q.flatten(-2)[..., : x.shape[-1]].contiguous(), scale.squeeze(-1)


def act_fake_quant(x: Tensor, group: int = BLOCK, *, check: bool = False) -> Tensor:
    """What act_quant keeps of x [..., K]: q * scale, in x's shape and dtype (float32 or bfloat16; exact in both)."""
    if check:
        check_finite(x)
    magnitude = _groups(as_float32(x), group).abs()
    scale = _act_scale(magnitude)
    return _with_sign(round_magnitude_(magnitude.div_(scale), mantissa_bits=3, min_exponent=-6).mul_(scale), x)


def fp4_act_fake_quant(x: Tensor, group: int = mxfp4.GROUP, *, check: bool = False) -> Tensor:
    """x [..., K] rounded to E2M1 with one power-of-two scale per group (the MXFP4 rule), in x's shape and dtype."""
    if check:
        check_finite(x)
    magnitude = _groups(as_float32(x), group).abs()
    scale = mxfp4.group_scale(magnitude.amax(dim=-1, keepdim=True))
    return _with_sign(round_magnitude_(magnitude.div_(scale), mantissa_bits=1, min_exponent=0).mul_(scale), x)


def _with_sign(magnitude: Tensor, x: Tensor) -> Tensor:
    return magnitude.flatten(-2)[..., : x.shape[-1]].to(x.dtype).contiguous().copysign_(x)
