"""Weights in the order in which a tensor core takes them: blocks of 16 rows x 64 columns, one after the other along K.

Lane l of a warp is (g, t) = (l / 4, l % 4). In every format it holds rows g and g + 8 of a block and the columns
16 t .. 16 t + 15, one NVFP4 scale group. The block is four m16n8k16 products; product j takes its columns
16 t + 4 j .. 16 t + 4 j + 3 of each lane, so that register i (0..3), half h, of the A operand is

    row g + 8 (i % 2),  column 16 t + 4 j + 2 (i / 2) + h

A 16-row tile is one contiguous stream of blocks. Rows and columns beyond the matrix are zeros.

    NVFP4  576 bytes: [lane][product] words of 8 codes, then [lane][row g, row g + 8] E4M3 scales
           half h of a word holds its codes of registers 0..3, a magnitude (3 bits) and a sign each:
           bit 15 14 13 12  11 10 9  8 7 6  5 4 3  2 1 0
               s0 s2 s3 s1    m0      m1     m2     m3        which one mask or one multiplication moves into FP16
    FP8   1024 bytes: [product / 2][lane][product % 2][i / 2][i % 2][h] E4M3
    BF16  2048 bytes: [product][lane][i / 2][i % 2][h]
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.quant.formats import pack_nibbles, unpack_nibbles

ROWS, COLUMNS, GROUP = 16, 64, 16
NVFP4_BYTES, FP8_BYTES, BF16_BYTES = 576, 1024, 2048
_CODES = ROWS * COLUMNS // 2
_AT_ONCE = 1 << 22  # values packed at a time: a packed model must fit beside what packing it takes
_AT_ONCE_GPU = 1 << 25  # there each takes about 10 bytes meanwhile, and a slice some thirty launches
_SIGN, _MAGNITUDE = (15, 12, 14, 13), (9, 6, 3, 0)  # bits of the code of register i


def tiles_shape(rows: int, columns: int, block_bytes: int) -> tuple[int, int, int]:
    return -(-rows // ROWS), -(-columns // COLUMNS), block_bytes


def pack_nvfp4(codes: Tensor, scale: Tensor) -> Tensor:
    """codes u8 [..., N, K/2] (even column low), scale e4m3 [..., N, K/16] -> u8 [..., ceil(N/16), ceil(K/64), 576]."""
    rows, columns = codes.shape[-2], codes.shape[-1] * 2
    if scale.shape != (*codes.shape[:-1], columns // GROUP) or columns % GROUP:
        raise KernelError(f"codes {list(codes.shape)} and scales {list(scale.shape)} do not belong together")
    out = _empty(codes, rows, columns, NVFP4_BYTES)
    for into, some, groups in _slices(out, codes, scale.view(torch.uint8)):
        values = _lanes(unpack_nibbles(some)).to(torch.int32)  # [n, kb, g, t, j, p, h, r]
        halves = torch.zeros((*values.shape[:5], 2), dtype=torch.int32, device=codes.device)
        for register, (sign, magnitude) in enumerate(zip(_SIGN, _MAGNITUDE, strict=True)):
            code = values[..., register // 2, :, register % 2]
            halves |= (code & 7) << magnitude | (code >> 3) << sign
        into[..., :_CODES] = halves.to(torch.int16).flatten(2).view(torch.uint8)
        groups = (
            _padded(groups, ROWS, COLUMNS // GROUP).unflatten(1, (-1, 4)).unflatten(0, (-1, 2, 8))
        )  # [n, r, g, kb, t]
        into[..., _CODES:] = groups.permute(0, 3, 2, 4, 1).flatten(2)
    return out


def unpack_nvfp4(tiles: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The inverse of pack_nvfp4: codes u8 [..., N, K/2] and scale e4m3 [..., N, K/16] of an [N, K] matrix."""
    halves = tiles[..., :_CODES].contiguous().view(torch.int16).to(torch.int32).unflatten(-1, (8, 4, 4, 2))
    codes = [halves >> m & 7 | (halves >> s & 1) << 3 for s, m in zip(_SIGN, _MAGNITUDE, strict=True)]
    values = torch.stack(codes, dim=-1).unflatten(-1, (2, 2)).transpose(-2, -3)  # [..., n, kb, g, t, j, p, h, r]
    flat = pack_nibbles(_matrix(values.to(torch.uint8), rows, columns))
    return flat, _scales(tiles[..., _CODES:], rows, columns)


def _scales(bytes_: Tensor, rows: int, columns: int) -> Tensor:
    groups = bytes_.unflatten(-1, (8, 4, 2))  # [..., n, kb, g, t, r]
    lead = list(range(groups.dim() - 5))
    n, kb, g, t, r = range(groups.dim() - 5, groups.dim())
    flat = groups.permute(*lead, n, r, g, kb, t).flatten(-2).flatten(-4, -2)
    return flat[..., :rows, : columns // GROUP].contiguous().view(torch.float8_e4m3fn)


def pack_fp8(data: Tensor) -> Tensor:
    """data e4m3 [..., N, K] -> u8 [..., ceil(N/16), ceil(K/64), 1024]."""
    return _pack(data.view(torch.uint8), FP8_BYTES, 2)


def pack_bf16(data: Tensor) -> Tensor:
    """data bf16 [..., N, K] -> u8 [..., ceil(N/16), ceil(K/64), 2048]."""
    return _pack(data.view(torch.int16), BF16_BYTES, 4)


def unpack_fp8(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of pack_fp8."""
    return _unpack(tiles, torch.uint8, 2, rows, columns).view(torch.float8_e4m3fn)


def unpack_bf16(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of pack_bf16."""
    return _unpack(tiles, torch.int16, 4, rows, columns).view(torch.bfloat16)


def _pack(data: Tensor, block_bytes: int, pieces: int) -> Tensor:
    """A lane's products in `pieces` accesses of 16 bytes."""
    rows, columns = data.shape[-2:]
    out = _empty(data, rows, columns, block_bytes)
    for into, some in _slices(out, data):
        values = _lanes(some).transpose(-1, -2)  # [n, kb, g, t, j, p, r, h]
        ordered = values.unflatten(4, (pieces, -1)).movedim(4, 2).flatten(2)
        into.copy_(ordered.view(torch.uint8))
    return out


def _unpack(tiles: Tensor, dtype: torch.dtype, pieces: int, rows: int, columns: int) -> Tensor:
    values = tiles.contiguous().view(dtype).unflatten(-1, (pieces, 8, 4, 4 // pieces, 2, 2, 2))
    values = values.movedim(-7, -5).flatten(-5, -4)  # [..., n, kb, g, t, j, p, r, h]
    return _matrix(values.transpose(-1, -2), rows, columns)


def _empty(like: Tensor, rows: int, columns: int, block_bytes: int) -> Tensor:
    shape = (*like.shape[:-2], *tiles_shape(rows, columns, block_bytes))
    return torch.empty(shape, dtype=torch.uint8, device=like.device)


def _slices(out: Tensor, *sources: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Where tiles go, and the same rows of each source [..., N, C_i]: whole tiles, about _AT_ONCE values each."""
    rows = sources[0].shape[-2]
    if rows % ROWS == 0 or out.dim() == 3:  # the tiles of all matrices are those of one
        every = [(out.view(-1, *out.shape[-2:]), *(source.flatten(0, -2) for source in sources))]
    else:
        every = list(zip(out.flatten(0, -4), *(source.flatten(0, -3) for source in sources), strict=True))
    values = _AT_ONCE_GPU if out.is_cuda else _AT_ONCE
    step = max(values // max(out.shape[-2] * COLUMNS, 1) // ROWS, 1)
    for into, *some in every:
        for first in range(0, len(into), step):
            last = first + step
            yield into[first:last], *(source[first * ROWS : last * ROWS] for source in some)


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    return F.pad(x, (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))


def _lanes(x: Tensor) -> Tensor:
    """x [N, K] -> [n, kb, g, t, j, p, h, r]: tile, block, lane, product, register i = 2 p + r, half."""
    x = _padded(x, ROWS, COLUMNS).unflatten(1, (-1, 4, 4, 2, 2)).unflatten(0, (-1, 2, 8))  # [n, r, g, kb, t, j, p, h]
    return x.permute(0, 3, 2, 4, 5, 6, 7, 1)


def _matrix(values: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of _lanes, with leading dimensions."""
    n, kb, g, t, j, p, h, r = range(values.dim() - 8, values.dim())
    whole = values.permute(*range(values.dim() - 8), n, r, g, kb, t, j, p, h).flatten(-5).flatten(-4, -2)
    return whole[..., :rows, :columns].contiguous()
