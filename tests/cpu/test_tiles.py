"""Tiles: packing and its inverse, and what a tensor core makes of the bytes by the instructions of the headers.

The emulation below knows the registers of mma.m16n8k16 from the PTX manual and does what include/dsv4/w4.cuh does, bit
for bit; the truth is dequantize().
"""

import numpy as np
import pytest
import torch

from dsv4.errors import KernelError
from dsv4.kernels import tiles
from dsv4.quant import nvfp4
from dsv4.quant.weights import FP8Weight

SHAPES = [(16, 64), (48, 256), (40, 208), (1, 16), (33, 64), (17, 80)]
UNDO = 2.0**14


def random_nvfp4(*shape):
    g = torch.Generator().manual_seed(sum(shape))
    codes = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), generator=g, dtype=torch.uint8)
    scale = torch.randint(0, 0x7F, (*shape[:-1], shape[-1] // 16), generator=g, dtype=torch.uint8)  # all but NaN
    return codes, scale.view(torch.float8_e4m3fn)


@pytest.mark.parametrize("shape", [*SHAPES, (3, 40, 208), (2, 3, 16, 64)])
def test_unpacking_gives_back_what_was_packed(shape):
    codes, scale = random_nvfp4(*shape)
    packed = tiles.pack_nvfp4(codes, scale)
    assert packed.shape == (*shape[:-2], -(-shape[-2] // 16), -(-shape[-1] // 64), 576)
    got = tiles.unpack_nvfp4(packed, *shape[-2:])
    assert torch.equal(got[0], codes) and torch.equal(got[1].view(torch.uint8), scale.view(torch.uint8))
    data = torch.randint(0, 256, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(tiles.unpack_fp8(tiles.pack_fp8(data), *shape[-2:]).view(torch.uint8), data.view(torch.uint8))
    plain = torch.randn(shape).bfloat16()
    assert torch.equal(tiles.unpack_bf16(tiles.pack_bf16(plain), *shape[-2:]), plain)


@pytest.mark.parametrize("shape", [(2, 100, 192), (3, 48, 192), (2, 2, 16, 192), (100, 192)])
def test_packing_in_slices_is_packing_at_once(monkeypatch, shape):
    codes, scale = random_nvfp4(*shape)
    data = torch.randint(0, 256, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    whole, eight = tiles.pack_nvfp4(codes, scale), tiles.pack_fp8(data)
    monkeypatch.setattr(tiles, "_AT_ONCE", 192 * 32)
    assert torch.equal(tiles.pack_nvfp4(codes, scale), whole) and torch.equal(tiles.pack_fp8(data), eight)


def test_codes_and_scales_that_do_not_match_are_refused():
    codes, scale = random_nvfp4(32, 64)
    with pytest.raises(KernelError, match="do not belong together"):
        tiles.pack_nvfp4(codes, scale[:, :3])


def f16_of_e4m3(byte):
    return torch.from_numpy(np.asarray(byte, dtype=np.uint8)).view(torch.float8_e4m3fn).half().numpy()


def nvfp4_operands(block):
    """The A registers [product, lane, register, half] float16 that dequantize() in w4.cuh makes of 576 bytes."""
    words = block[:512].view("<u4").reshape(32, 4).astype(np.uint64)
    scale = f16_of_e4m3(block[512:].reshape(32, 2))
    a = np.zeros((4, 32, 4, 2), np.float16)
    for product in range(4):
        w, value, full = words[:, product], np.uint64(0x8E008E00), np.uint64(0xFFFFFFFF)
        registers = [
            w & value,
            (w << np.uint64(3)) & full & value,
            ((w & np.uint64(0x40384038)) * np.uint64(66)) & full & value,
            ((w & np.uint64(0x20072007)) * np.uint64(516)) & full & value,
        ]
        for i, register in enumerate(registers):
            halves = register.astype("<u4").view("<u2").reshape(32, 2).view(np.float16)
            a[product, :, i] = halves * scale[:, i % 2, None]  # one FP16 multiplication, as mul.rn.f16x2
    return a


def fp8_operands(block):
    words = block.reshape(2, 32, 2, 2, 2, 2)  # piece, lane, product % 2, i / 2, i % 2, half
    values = f16_of_e4m3(words)
    return np.transpose(values, (0, 2, 1, 3, 4, 5)).reshape(4, 32, 4, 2)


def bf16_operands(block):
    values = torch.from_numpy(block.view("<i2").reshape(4, 32, 4, 2).copy()).view(torch.bfloat16)
    return values.float().numpy()


def product(a, x):
    """One block times tokens x [8, 64]: C [16, 8], through the slots of m16n8k16 for A, B and C."""
    c = np.zeros((16, 8))
    for j in range(4):
        matrix, tokens = np.zeros((16, 16)), np.zeros((16, 8))
        for lane in range(32):
            g, t = divmod(lane, 4)
            b = x[g, 16 * t : 16 * t + 16].reshape(8, 2)[2 * j : 2 * j + 2]  # load_b: registers 2 j and 2 j + 1
            for h in range(2):
                for i in range(4):
                    matrix[g + 8 * (i % 2), 2 * t + 8 * (i // 2) + h] = a[j, lane, i, h]
                for p in range(2):
                    tokens[2 * t + 8 * p + h, g] = b[p, h]
        c += matrix @ tokens
    return c


def multiplied(packed, operands, n, k, undo):
    """Every column of the matrix, found by unit tokens: exact, whatever the order of summation."""
    out = np.zeros((packed.shape[0] * 16, packed.shape[1] * 64))
    for tile in range(packed.shape[0]):
        for block in range(packed.shape[1]):
            a = operands(packed[tile, block].numpy()).astype(np.float64)
            for first in range(0, 64, 8):
                x = np.zeros((8, 64))
                x[np.arange(8), first + np.arange(8)] = undo
                column = block * 64 + first
                out[tile * 16 : tile * 16 + 16, column : column + 8] = product(a, x)
    assert not out[n:].any() and not out[:, k:].any()  # padding is zeros
    return torch.from_numpy(out[:n, :k])


@pytest.mark.parametrize(("n", "k"), [(32, 128), (40, 208), (1, 16)])
def test_a_tensor_core_sees_the_values_of_every_row_and_column(n, k):
    codes, scale = random_nvfp4(n, k)
    true = nvfp4.dequantize(codes, scale, torch.ones(()), dtype=torch.float64)
    assert torch.equal(multiplied(tiles.pack_nvfp4(codes, scale), nvfp4_operands, n, k, UNDO), true)
    eight = FP8Weight.quantize(torch.randn(n, k)).data
    assert torch.equal(multiplied(tiles.pack_fp8(eight), fp8_operands, n, k, 1.0), eight.double())
    plain = torch.randn(n, k).bfloat16()
    assert torch.equal(multiplied(tiles.pack_bf16(plain), bf16_operands, n, k, 1.0), plain.double())


def test_every_code_meets_every_scale_exactly_in_fp16():
    """The largest and smallest products, subnormal ones included: all 16 codes x all 127 scales in every position."""
    scale = torch.arange(128, dtype=torch.uint8).clamp(max=0x7E).repeat_interleave(16).view(128, 16)
    codes = torch.arange(16, dtype=torch.uint8).repeat(128, 16).view(128, 256)
    packed = (codes[:, 1::2] << 4) | codes[:, ::2]
    kinds = scale.view(torch.float8_e4m3fn)
    true = nvfp4.dequantize(packed, kinds, torch.ones(()), dtype=torch.float64)
    assert torch.equal(multiplied(tiles.pack_nvfp4(packed, kinds), nvfp4_operands, 128, 256, UNDO), true)
