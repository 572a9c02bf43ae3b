"""Small number formats written from their definitions, in numpy float64: the oracle's own decoders and quantisers.

Nothing here comes from `dsv4`: a mistake made there must not be made here a second time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

# E2M1: bit 3 is the sign, the low three bits index these magnitudes.
E2M1_MAGNITUDES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def _e4m3_table() -> Array:
    """The 256 values of E4M3FN by code: 4 exponent bits (bias 7), 3 mantissa bits, NaN at 0x7f and 0xff."""
    table = np.empty(256)
    for code in range(256):
        exponent, mantissa = (code >> 3) & 15, code & 7
        magnitude = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        if exponent == 15 and mantissa == 7:
            magnitude = np.nan
        table[code] = -magnitude if code & 128 else magnitude
    return table


E4M3_VALUES = _e4m3_table()
E4M3_MAGNITUDES = E4M3_VALUES[:127]  # 0 .. 448, ascending, index = code


def decode_e2m1(codes: NDArray[np.uint8]) -> Array:
    """Codes 0..15 -> values."""
    return np.where(codes & 8, -1.0, 1.0) * E2M1_MAGNITUDES[codes & 7]


def decode_e4m3(codes: NDArray[np.uint8]) -> Array:
    """Bytes -> values (NaN for the two NaN codes)."""
    return E4M3_VALUES[codes]


def decode_e8m0(codes: NDArray[np.uint8]) -> Array:
    """Bytes -> 2^(byte - 127); byte 255 is NaN."""
    return np.where(codes == 255, np.nan, np.ldexp(1.0, codes.astype(np.int64) - 127))


def unpack_nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[..., K/2] bytes -> [..., K] codes: element 2k is the LOW nibble of byte k."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def pack_nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[..., K] codes -> [..., K/2] bytes."""
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8)


def nearest_code(magnitude: Array, table: Array) -> NDArray[np.int64]:
    """Index of the nearest entry of the ascending `table`; a tie goes to the even index; above the table saturates."""
    middles = (table[1:] + table[:-1]) / 2
    index = np.searchsorted(middles, magnitude, side="left")  # a value on a middle stays below it ...
    on_middle = (index < len(middles)) & (middles[np.minimum(index, len(middles) - 1)] == magnitude)
    return index + (on_middle & (index % 2 == 1))  # ... unless the code below is odd


def encode_e2m1(x: Array) -> NDArray[np.uint8]:
    """Values -> codes 0..15, round to nearest, ties to the even code, saturating at 6."""
    return (nearest_code(np.abs(x), E2M1_MAGNITUDES) + 8 * np.signbit(x)).astype(np.uint8)


def encode_e4m3(x: Array) -> NDArray[np.uint8]:
    """Values -> bytes, round to nearest, ties to the even code, saturating at 448."""
    return (nearest_code(np.abs(x), E4M3_MAGNITUDES) + 128 * np.signbit(x)).astype(np.uint8)


def ceil_log2(x: Array) -> NDArray[np.int64]:
    """Exact ceil(log2(x)) for positive x, from the exponent and mantissa."""
    mantissa, exponent = np.frexp(x)  # x = mantissa * 2^exponent, mantissa in [0.5, 1)
    return exponent.astype(np.int64) - (mantissa == 0.5)


def group_amax(x: Array, group: int) -> Array:
    """[..., K] -> [..., K/group] largest magnitude of each group."""
    if x.shape[-1] % group:
        raise ValueError(f"last dimension {x.shape[-1]} is not a multiple of the group {group}")
    return np.abs(x).reshape(*x.shape[:-1], x.shape[-1] // group, group).max(-1)


def act_scale(x: Array, group: int) -> Array:
    """SPEC 2.0 act_quant: one power-of-two scale a group, 2^ceil(log2(max(amax, 1e-4) / 448))."""
    return np.ldexp(1.0, ceil_log2(np.maximum(group_amax(x, group), 1e-4) / 448))


def act_quant(x: Array, group: int) -> Array:
    """SPEC 2.0 act_quant and back: every group of `group` values to E4M3 times its power-of-two scale."""
    scale = np.repeat(act_scale(x, group), group, axis=-1)
    return decode_e4m3(encode_e4m3(np.clip(x / scale, -448, 448))) * scale


def fp4_scale(x: Array, group: int = 32) -> Array:
    """SPEC 2.0 fp4_act_quant: 2^ceil(log2(max(amax, 6 * 2^-126) / 6)) a group."""
    return np.ldexp(1.0, ceil_log2(np.maximum(group_amax(x, group), 6 * 2.0**-126) / 6))


def fp4_act_quant(x: Array, group: int = 32) -> Array:
    """SPEC 2.0 fp4_act_quant and back: E2M1 times a power-of-two scale a group."""
    scale = np.repeat(fp4_scale(x, group), group, axis=-1)
    return decode_e2m1(encode_e2m1(np.clip(x / scale, -6, 6))) * scale


def hadamard(n: int) -> Array:
    """The n x n Walsh-Hadamard matrix in natural order (Sylvester), normalised by n^-0.5."""
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    if len(matrix) != n:
        raise ValueError(f"{n} is not a power of two")
    return matrix * n**-0.5
