"""The three small number formats: E2M1 (FP4 values), E4M3 (FP8 values, NVFP4 scales), E8M0 (power-of-two scales).

Rounding everywhere: to nearest, ties to the even code, saturating at the largest finite value.
Minus zero keeps its sign.
Tensors live on any device; nothing here copies to the host unless a function says so.

Packed E2M1: two codes in a byte along the last dimension, the even index in the LOW nibble.

    byte b of a row      bit 7 6 5 4   bit 3 2 1 0
                         code[2b+1]    code[2b]        code = s e e m  (sign, exponent bias 1, mantissa)
"""

import functools

import torch
from torch import Tensor

from dsv4.errors import Dsv4Error, KernelError
from dsv4.quant.scalars import scalar

#: Value of each of the 16 E2M1 codes; code 8 is minus zero. No Inf, no NaN.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_TINY = 2.0**-9  #: smallest positive E4M3 value (subnormal)
E8M0_BIAS = 127

_EXPONENT_MASK = scalar(0x7F800000, torch.int32)
_MANTISSA_MASK = scalar(0x007FFFFF, torch.int32)


def as_float32(x: Tensor, name: str = "x") -> Tensor:
    """x as float32 without rounding: float32 itself or exact from bfloat16. Raises KernelError for another dtype."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise KernelError(f"{name} is {x.dtype}; quantisers take float32 or bfloat16, cast it first")
    return x.float()


def check_finite(x: Tensor, name: str = "x", error: type[Dsv4Error] = KernelError) -> None:
    """Raise `error` naming `name` when x holds NaN or Inf. Copies one bool to the host."""
    bad = ~torch.isfinite(x)
    if bool(bad.any()):
        first = tuple(int(i) for i in bad.nonzero()[0])
        raise error(
            f"{name}: {int(bad.sum())} of {x.numel()} values are NaN or Inf, the first at index {first}; "
            "expected finite values only, repair the source of this tensor"
        )


def groups_of(x: Tensor, group: int, name: str = "x") -> Tensor:
    """View x [..., K] as [..., K/group, group]. Raises KernelError when K is not a multiple of group."""
    columns = x.shape[-1]
    if columns % group:
        raise KernelError(f"{name} has last dimension {columns}; expected a multiple of {group}, pad it with zeros")
    return x.unflatten(-1, (columns // group, group))


def round_magnitude_(y: Tensor, *, mantissa_bits: int, min_exponent: int) -> Tensor:
    """Round float32 y >= 0 in place to the nearest value with that many mantissa bits, ties to even; returns y.

    The spacing is fixed below 2^min_exponent: E2M1 is (1, 0), E4M3 is (3, -6). NaN stays NaN.
    Does not saturate: keep y within half a step of the format's maximum.
    Five elementwise kernels instead of a table search or an FP8 round trip, which are several times slower on a CPU.
    """
    power = y.clamp(min=2.0**min_exponent).view(torch.int32).bitwise_and_(_EXPONENT_MASK).view(torch.float32)
    # One unit in the last place of `magic` is the step we want, so the addition itself rounds, and rounds ties to even.
    magic = power.mul_(scalar(1.5 * 2.0 ** (23 - mantissa_bits)))
    return y.add_(magic).sub_(magic)


def pow2_ceil(x: Tensor) -> Tensor:
    """Smallest power of two >= x, for normal positive float32 x: exponent bits, plus one if a mantissa bit is set."""
    return (x.view(torch.int32) + _MANTISSA_MASK).bitwise_and_(_EXPONENT_MASK).view(torch.float32)


def e2m1_encode(x: Tensor, *, check: bool = False) -> Tensor:
    """Nearest E2M1 codes (uint8, 0..15) of x [...] float32 or bfloat16: ties to even, saturating at 6.

    The sign of zero is kept: -0.0 and small negative values give code 8. NaN has no code: it becomes an arbitrary one.
    check=True raises KernelError on NaN or Inf (and synchronises).
    """
    if check:
        check_finite(x)
    return e2m1_encode_magnitude_(as_float32(x).abs()).add_(torch.signbit(x), alpha=8)


def e2m1_encode_magnitude_(y: Tensor) -> Tensor:
    """Sign-less codes (uint8, 0..7) of float32 y >= 0 by the rule of e2m1_encode; y is used up as scratch."""
    power = y.clamp_(max=E2M1_MAX).clamp(min=1.0).view(torch.int32).bitwise_and_(_EXPONENT_MASK)
    # As in round_magnitude_ with a step of power/2; the low bits of the sum then hold round(y / step) + 2.
    # Each octave e adds 2 codes: bits of 2^e shifted right by 22 are 2e + 254, and 254 + 2 vanishes modulo 256.
    bits = y.add_(power.view(torch.float32) * (1.5 * 2.0**22 + 1.0)).view(torch.int32)
    return bits.add_(power.bitwise_right_shift_(22)).to(torch.uint8).bitwise_and_(7)


@functools.cache
def _e2m1_pairs(device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a cached table must stay usable outside the mode it was first needed in
        values = torch.tensor(E2M1_VALUES, dtype=torch.float32)
        byte = torch.arange(256)
        return torch.stack((values[byte & 15], values[byte >> 4]), dim=-1).to(device)


def e2m1_decode(codes: Tensor) -> Tensor:
    """float32 values of unpacked E2M1 codes [...] uint8 (0..15)."""
    return _e2m1_pairs(codes.device)[:, 0].index_select(0, codes.flatten().int()).view(codes.shape)


def e2m1_decode_packed(packed: Tensor) -> Tensor:
    """float32 values [..., K] of packed codes [..., K/2] uint8."""
    pairs = _e2m1_pairs(packed.device).index_select(0, packed.flatten().int())
    return pairs.view(*packed.shape[:-1], packed.shape[-1] * 2)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack codes [..., K] uint8 (0..15), K even, into [..., K/2] uint8: even index in the LOW nibble, as drawn."""
    if codes.shape[-1] % 2:
        raise KernelError(f"cannot pack {codes.shape[-1]} codes two to a byte; expected an even last dimension")
    # A pair read as one little-endian int16 is 0x0H0L; OR-ing its shift by 4 puts 0xHL into the low byte.
    pair = codes.contiguous().view(torch.int16)
    return (pair >> 4).bitwise_or_(pair).to(torch.uint8)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Codes [..., K] uint8 (0..15) of packed bytes [..., K/2] uint8; inverse of pack_nibbles."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def e4m3_encode(x: Tensor, *, check: bool = False) -> Tensor:
    """Nearest float8_e4m3fn of x [...] float32 or bfloat16: ties to even, saturating at 448 (Inf too). NaN stays NaN.

    check=True raises KernelError on NaN or Inf (and synchronises).
    """
    if check:
        check_finite(x)
    # The clamp makes saturation ours: torch's own cast has given NaN and has given 448 beyond 464, by version.
    return as_float32(x).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def e4m3_decode(q: Tensor) -> Tensor:
    """float32 values of float8_e4m3fn (or its uint8 bytes); exact. Bytes 0x7F and 0xFF are NaN."""
    return q.view(torch.float8_e4m3fn).float()


def e8m0_encode(exponent: Tensor, *, check: bool = False) -> Tensor:
    """E8M0 bytes (uint8) of integer exponents [...] in [-127, 127]: byte = exponent + 127.

    check=True raises KernelError for an exponent outside that range (and synchronises); else it is clamped.
    """
    if check and exponent.numel():
        low, high = (int(v) for v in exponent.aminmax())
        if low < -E8M0_BIAS or high > E8M0_BIAS:
            raise KernelError(f"E8M0 exponents run from {low} to {high}; expected -127..127, rescale the tensor")
    return (exponent.clamp(-E8M0_BIAS, E8M0_BIAS) + E8M0_BIAS).to(torch.uint8)


def e8m0_decode(byte: Tensor) -> Tensor:
    """float32 values 2^(byte - 127) of E8M0 bytes [...] uint8; exact (0 is the subnormal 2^-127). Byte 255 is NaN."""
    return byte.view(torch.float8_e8m0fnu).float()
