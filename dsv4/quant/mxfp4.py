"""MXFP4: value = e2m1(code) * 2^(byte - 127), groups of 32 along K. The release format of the routed experts.

    scale = 2^ceil(log2(max(group_amax, 6 * 2^-126) / 6)),  code = E2M1(x / scale), ties to even

Zero group: the floor on amax gives scale 2^-126 (byte 1) and signed-zero codes, so it decodes to exact zeros.
"""

import torch
from torch import Tensor

from dsv4.quant.formats import (
    E2M1_MAX,
    as_float32,
    check_finite,
    e2m1_decode_packed,
    e2m1_encode,
    e8m0_decode,
    groups_of,
    pack_nibbles,
    pow2_ceil,
)
from dsv4.quant.scalars import scalar

GROUP = 32
AMAX_FLOOR = E2M1_MAX * 2.0**-126
_INV_MAX = scalar(1.0 / E2M1_MAX)


def group_scale(amax: Tensor) -> Tensor:
    """Scale of groups with largest magnitude `amax` float32 [...]: the smallest power of two with amax / scale <= 6."""
    # x / 6 and x * float32(1/6) have the same ceil; the product is also the same on every device.
    return pow2_ceil(amax.clamp(min=AMAX_FLOOR).mul_(_INV_MAX))


def quantize(x: Tensor, *, check: bool = True, name: str = "x") -> tuple[Tensor, Tensor]:
    """Quantise x [..., K] (float32 or bfloat16, K % 32 == 0) to (codes uint8 [..., K/2], e8m0 uint8 [..., K/32]).

    Raises KernelError naming `name` on NaN or Inf unless check=False (which does not synchronise).
    """
    if check:
        check_finite(x, name)
    groups = groups_of(as_float32(x, name), GROUP, name)
    scale = group_scale(groups.abs().amax(dim=-1))
    codes = e2m1_encode(groups / scale.unsqueeze(-1))
    return pack_nibbles(codes.flatten(-2)), scale.to(torch.float8_e8m0fnu).view(torch.uint8)


def dequantize(codes: Tensor, e8m0: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values [..., K] of codes [..., K/2] uint8 and e8m0 [..., K/32] uint8.

    Exact in float32, float64 and bfloat16. Values below 2^-126 are subnormal there, and a device may flush them.
    """
    values = groups_of(e2m1_decode_packed(codes), GROUP, "values") * e8m0_decode(e8m0).unsqueeze(-1)
    return values.flatten(-2).to(dtype)
