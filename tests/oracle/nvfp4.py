"""NVFP4 operands of a Blackwell GEMM, written and read by the formulas of the format alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .formats import Array, decode_e2m1, decode_e4m3, encode_e2m1, encode_e4m3, pack_nibbles, unpack_nibbles


@dataclass(frozen=True)
class Operand:
    """One side of the product: packed codes [R, K/2], swizzled scale bytes (flat), globals [] or [R] in decode form."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.uint8]
    globals: NDArray[np.float32]

    def values(self) -> Array:
        """float64 [R, K]: e2m1 * e4m3 * global, each scale fetched from its swizzled place."""
        rows, columns = len(self.codes), self.codes.shape[1] * 2 // 16
        scales = decode_e4m3(self.scales[offsets(rows, columns)])
        values = decode_e2m1(unpack_nibbles(self.codes)) * np.repeat(scales, 16, axis=-1)
        return values * np.asarray(self.globals, np.float64).reshape(-1, 1)


def offsets(rows: int, columns: int) -> NDArray[np.int64]:
    """[rows, columns] byte offset of scale (i, j) in the 128x4 tiles: 32 rows of 16 bytes, four rows side by side."""
    i, j = np.arange(rows)[:, None], np.arange(columns)[None, :]
    tile = (i // 128) * (-(-columns // 4)) + j // 4
    return tile * 512 + (i % 32) * 16 + (i % 128) // 32 * 4 + j % 4


def quantise_rows(x: NDArray[np.float32]) -> Operand:
    """x [R, K] -> one float32 global a row (amax / 2688), a scale per 16 values, codes; every step in float32."""
    x = np.asarray(x, np.float32)
    blocks = x.reshape(len(x), -1, 16)
    amax = np.abs(blocks).max(-1)
    globals_ = amax.max(-1) / np.float32(2688)
    scale = encode_e4m3(np.clip(amax / (globals_[:, None] * np.float32(6)), np.float32(2.0**-9), np.float32(448)))
    step = decode_e4m3(scale).astype(np.float32) * globals_[:, None]
    codes = encode_e2m1(blocks / step[..., None])
    rows, columns = scale.shape
    flat = np.zeros(-(-rows // 128) * 128 * (-(-columns // 4) * 4), np.uint8)
    flat[offsets(rows, columns)] = scale
    return Operand(pack_nibbles(codes.reshape(len(x), -1)), flat, globals_)
