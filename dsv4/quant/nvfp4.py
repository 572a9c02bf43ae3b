"""NVFP4: value = e2m1(code) * e4m3(scale) * global, groups of 16 along K, one float32 global per tensor or per row.

    global = amax / 2688                        2688 = 6 * 448; stored in DECODE form: it multiplies
    scale  = E4M3(clamp(group_amax / (6 * global), 2^-9, 448))
    code   = E2M1(x / (scale * global))         a true division, by the ROUNDED scale

Zero group: the clamp gives scale byte 0x01 (2^-9) and the codes are signed zeros, so it decodes to exact zeros.
Zero tensor or row: its amax is raised to 2^-100 before the division, so the global is never 0 and nothing divides by 0.
"""

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.quant.formats import (
    E2M1_MAX,
    E4M3_MAX,
    E4M3_TINY,
    as_float32,
    check_finite,
    e2m1_decode_packed,
    e2m1_encode,
    e2m1_encode_magnitude_,
    e4m3_decode,
    groups_of,
    pack_nibbles,
)

GROUP = 16
MX_GROUP = 32
GLOBAL_RANGE = E2M1_MAX * E4M3_MAX  #: 2688, the largest product of a code and a scale
AMAX_FLOOR = 2.0**-100
_GLOBAL_FLOOR = AMAX_FLOOR / GLOBAL_RANGE
SCALE_EXPONENTS = (-9, 8)  #: an E4M3 scale holds the powers of two 2^-9 .. 2^8


def quantize(
    x: Tensor,
    *,
    per_row: bool = False,
    global_scale: Tensor | None = None,
    check: bool = False,
    name: str = "x",
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise x [..., N, K] (float32 or bfloat16, K a multiple of 16) to (codes, scale, global).

    codes  [..., N, K/2]  uint8   packed E2M1
    scale  [..., N, K/16] e4m3
    global [...] float32, or [..., N] with per_row=True (each row then depends on itself alone: batch-invariant)

    A given `global_scale` ([...] or [..., N], decode form) is used and returned as it is; values beyond its range
    saturate, and a global of 0 decodes to zeros.
    N = 0 gives empty codes and scales. check=True raises KernelError naming `name` on NaN or Inf (and synchronises);
    without it a NaN or Inf makes its global, and so everything decoded with it, non-finite.
    """
    if check:
        check_finite(x, name)
    groups = groups_of(as_float32(x, name), GROUP, name)
    magnitude = groups.abs()
    group_amax = magnitude.amax(dim=-1)
    if global_scale is not None:
        _check_global(global_scale, x)
        stored = global_scale
        divisor = stored.clamp(min=_GLOBAL_FLOOR)
    else:
        stored = divisor = global_of(_amax(group_amax, per_row))
    divisor = _broadcast(divisor, group_amax.ndim)
    scale = group_amax.div_(divisor * E2M1_MAX).clamp_(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)
    magnitude.div_((scale.float() * divisor).unsqueeze(-1))
    codes = e2m1_encode_magnitude_(magnitude).add_(torch.signbit(groups), alpha=8)
    return pack_nibbles(codes.flatten(-2)), scale, stored


def global_of(amax: Tensor) -> Tensor:
    """The decode-form global of values up to `amax` [...] float32: amax / 2688, never 0."""
    # By a tensor: on CUDA, torch divides by a Python number as a multiplication by its rounded reciprocal.
    return amax.clamp(min=AMAX_FLOOR).div_(amax.new_full((), GLOBAL_RANGE))


def _amax(group_amax: Tensor, per_row: bool) -> Tensor:
    if per_row:
        return group_amax.amax(dim=-1)
    if group_amax.numel() == 0:  # amax has no identity for an empty reduction
        return group_amax.new_zeros(group_amax.shape[:-2])
    return group_amax.amax(dim=(-2, -1))


def dequantize(codes: Tensor, scale: Tensor, global_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values [..., N, K] of codes [..., N, K/2] uint8, scale [..., N, K/16] e4m3, global [...] or [..., N] float32.

    code * scale is exact; the global is multiplied last. Exact in float64; one rounding in float32; bfloat16 rounds the
    float32 result. The dimensions of `global_scale` tell per-tensor from per-row; another shape raises KernelError.
    """
    _check_global(global_scale, codes)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    values = groups_of(e2m1_decode_packed(codes).to(work), GROUP, "values") * e4m3_decode(scale).to(work).unsqueeze(-1)
    return values.mul_(_broadcast(global_scale, values.ndim)).flatten(-2).to(dtype)


def _check_global(global_scale: Tensor, of: Tensor) -> None:
    per_tensor, per_row = of.shape[:-2], of.shape[:-1]
    if global_scale.shape not in (per_tensor, per_row):
        raise KernelError(
            f"global scale has shape {tuple(global_scale.shape)}; "
            f"expected {tuple(per_tensor)} (per tensor) or {tuple(per_row)} (per row)"
        )


def _broadcast(global_scale: Tensor, ndim: int) -> Tensor:
    return global_scale.reshape(global_scale.shape + (1,) * (ndim - global_scale.ndim))


def mxfp4_exponents(codes: Tensor, e8m0: Tensor) -> tuple[Tensor, Tensor]:
    """(k_min, k_max): smallest and largest scale exponent over the non-zero groups of each MXFP4 tensor, int32 [...].

    codes [..., N, K/2] uint8, e8m0 [..., N, K/32] uint8. The cast to NVFP4 is exact when k_max - k_min <= 17.
    A tensor of zeros has k_min = k_max = 8, the exponent whose NVFP4 global is 1.
    """
    exponent = e8m0.int() - 127
    magnitudes = groups_of(codes, MX_GROUP // 2, "codes") & 0x77  # without signs: minus zero is zero
    used = (magnitudes != 0).any(dim=-1)
    largest, smallest = torch.iinfo(torch.int32).max, torch.iinfo(torch.int32).min
    empty = ~used.flatten(-2).any(dim=-1)
    k_min = exponent.masked_fill(~used, largest).flatten(-2).amin(dim=-1).masked_fill_(empty, 8)
    k_max = exponent.masked_fill(~used, smallest).flatten(-2).amax(dim=-1).masked_fill_(empty, 8)
    return k_min, k_max


def from_mxfp4(codes: Tensor, e8m0: Tensor, k_max: Tensor | int | None = None) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Recast MXFP4 (codes [..., N, K/2] uint8, e8m0 [..., N, K/32] uint8) as NVFP4 (codes, scale, global, exact).

    global = 2^(k_max - 8) per leading index, scale = 2^(k - k_max + 8) on each half of a group of 32, codes copied bit
    for bit. Pass `k_max` (int or int32 [...]) to share one global between tensors, e.g. the larger of w1's and w3's.
    Groups more than 17 octaves below k_max do not fit: they take scale 2^-9 and re-rounded codes. `exact` says whether
    every value is still the same number, which is certain when the span is <= 17; mxfp4_exponents tells which tensor
    of a stack spans more. Synchronises.
    Raises KernelError for an E8M0 NaN (byte 255) or a k_max below a tensor's own.
    """
    if bool((e8m0 == 255).any()):
        raise KernelError("MXFP4 scale holds byte 255 (NaN); expected 0..254, repair the source of this tensor")
    own_max = mxfp4_exponents(codes, e8m0)[1]
    k = own_max if k_max is None else torch.as_tensor(k_max, dtype=torch.int32, device=codes.device).expand_as(own_max)
    if bool((k < own_max).any()):
        found, needed = k.flatten().tolist(), own_max.flatten().tolist()
        raise KernelError(f"k_max {found} is below the largest scale exponent {needed}; pass the joint maximum")
    wanted = e8m0.int() - 127 - k[..., None, None] + 8
    held = wanted.clamp(*SCALE_EXPONENTS)
    scale = _exp2(held).to(torch.float8_e4m3fn).repeat_interleave(2, dim=-1)
    global_scale = _exp2(k - 8)
    if not bool((wanted < held).any()):
        return codes, scale, global_scale, True
    # -8 octaves take every code to zero; going no further keeps what is lost visible in float32.
    shift = (wanted - held).clamp_(-8, 0)
    values = (groups_of(e2m1_decode_packed(codes), MX_GROUP) * _exp2(shift).unsqueeze(-1)).flatten(-2)
    rounded = pack_nibbles(e2m1_encode(values))
    return rounded, scale, global_scale, torch.equal(e2m1_decode_packed(rounded), values)


def _exp2(exponent: Tensor) -> Tensor:
    # Through the bits of a float64: exact, also for float32 subnormals such as 2^-135, on every device.
    return ((exponent.long() + 1023) << 52).view(torch.float64).float()
