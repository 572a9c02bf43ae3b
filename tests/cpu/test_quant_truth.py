"""The truth of the quant tests: code tables from the bit fields, nearest code by search. It checks itself."""

import numpy as np

F32 = np.float32


def minifloat(code: int, *, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """Value of a sign-less float code from its fields, without any special codes."""
    exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    assert exponent < 1 << exponent_bits
    if exponent == 0:
        return mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


#: Values of the non-negative codes, in code order (which is also value order). E4M3FN has a NaN at 0x7F, so 127 values.
E2M1 = np.array([minifloat(code, exponent_bits=2, mantissa_bits=1, bias=1) for code in range(8)])
E4M3 = np.array([minifloat(code, exponent_bits=4, mantissa_bits=3, bias=7) for code in range(127)])


def nearest_code(magnitude: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Code of the value nearest to each magnitude >= 0, by distance to every value; of two as near, the even."""
    near_enough = np.minimum(np.asarray(magnitude, dtype=np.float64), 2 * table[-1])  # 1e38 - 6 would lose the 6
    distance = np.abs(near_enough[..., None] - table)
    near = distance == distance.min(axis=-1, keepdims=True)
    even = near & (np.arange(len(table)) % 2 == 0)
    return np.where(even.any(axis=-1), even.argmax(axis=-1), near.argmax(axis=-1))


def nearest(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """x rounded to the table, saturating, the sign kept (float64)."""
    return np.copysign(table[nearest_code(np.abs(x), table)], x)


def ceil_pow2(p: float) -> float:
    """Smallest power of two >= p > 0."""
    fraction, exponent = np.frexp(p)  # p = fraction * 2^exponent with fraction in [0.5, 1)
    return float(2.0 ** (int(exponent) - (fraction == 0.5)))


def around(values: np.ndarray) -> np.ndarray:
    """Each float32 value with its two float32 neighbours."""
    values = values.astype(F32)
    return np.concatenate([values, np.nextafter(values, F32(np.inf)), np.nextafter(values, F32(-np.inf))])


def midpoints(table: np.ndarray) -> np.ndarray:
    return (table[1:] + table[:-1]) / 2


def test_tables_hold_the_documented_values() -> None:
    assert E2M1.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert (E4M3[1], E4M3[8], E4M3[126]) == (2.0**-9, 2.0**-6, 448)
    assert (np.diff(E4M3) > 0).all()


def test_nearest_code_prefers_the_even_code() -> None:
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert E2M1[nearest_code(ties, E2M1)].tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert nearest(np.array([-1e9, -0.2, 5.1]), E2M1).tolist() == [-6, 0, 6]


def test_ceil_pow2() -> None:
    above, below = float(np.nextafter(F32(1), F32(2))), float(np.nextafter(F32(1), F32(0)))
    assert [ceil_pow2(p) for p in (1.0, above, below, 0.75, 3.0, 4.0)] == [1, 2, 1, 1, 4, 4]
