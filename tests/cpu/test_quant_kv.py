"""The bytes of the KV cache: what is packed reads back as the fake quantisers' values, by layout and by brute force."""

import struct

import pytest
import torch

from dsv4.checkpoint.sizes import kv_sizes
from dsv4.config import ModelConfig
from dsv4.errors import KernelError
from dsv4.quant import fp8, kv

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 += [-v for v in E2M1]


def e4m3(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -magnitude if code >> 7 else magnitude


def bfloat16(low: int, high: int) -> float:
    return struct.unpack("<f", bytes([0, 0, low, high]))[0]


def wild(rows: int, width: int, group: int) -> torch.Tensor:
    """BF16 of magnitudes 2^-40 to 2^40 between groups and 2^-12 to 1 inside them, zeros of both signs, a zero row."""
    gen = torch.Generator().manual_seed(width)
    x = torch.randn(rows, width, generator=gen) * 2.0 ** torch.randint(-12, 1, (rows, width), generator=gen)
    x *= (2.0 ** torch.randint(-40, 41, (rows, width // group, 1), generator=gen)).expand(-1, -1, group).flatten(1)
    x[torch.rand(rows, width, generator=gen) < 0.05] = 0.0
    x[torch.rand(rows, width, generator=gen) < 0.05] = -0.0
    x[0] = 0.0
    return x.bfloat16()


def entries(rows: int, head_dim: int, rope_dims: int) -> torch.Tensor:
    return torch.cat([wild(rows, head_dim - rope_dims, 64), torch.randn(rows, rope_dims).bfloat16()], dim=1)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32)


def test_sizes_are_those_inspect_counts_with():
    assert kv.entry_bytes(512, 64) == 584 and kv.index_key_bytes(128) == 68
    for name in ("random:tiny", "random:flash", "random:pro"):
        config = ModelConfig.from_name(name)
        unit = kv_sizes(config)
        assert kv.entry_bytes(config.head_dim, config.qk_rope_head_dim) == unit.entry
        assert kv.index_key_bytes(config.index_head_dim) == unit.index_key


@pytest.mark.parametrize(("head_dim", "rope_dims"), [(512, 64), (80, 16), (128, 64), (134, 6)])
def test_an_entry_reads_back_as_the_fake_quantiser_rounds_it(head_dim, rope_dims):
    plain = head_dim - rope_dims
    x = entries(300, head_dim, rope_dims)
    packed = kv.pack_entry(x, rope_dims)
    assert packed.shape == (300, kv.entry_bytes(head_dim, rope_dims)) and packed.shape[1] % 8 == 0
    expected = x.clone()
    expected[:, :plain] = fp8.act_fake_quant(x[:, :plain], 64)
    assert torch.equal(bits(kv.unpack_entry(packed, head_dim, rope_dims)), bits(expected))
    in_float32 = kv.unpack_entry(packed, head_dim, rope_dims, torch.float32)
    assert torch.equal(bits(in_float32), bits(expected.float()))


def test_an_entry_lies_as_drawn():
    x = entries(3, 512, 64)
    packed = kv.pack_entry(x, 64)
    for row, read in zip(packed.tolist(), kv.unpack_entry(packed, 512, 64).tolist(), strict=True):
        for channel in range(448):
            assert read[channel] == e4m3(row[channel]) * 2.0 ** (row[576 + channel // 64] - 127)
        for i in range(64):
            assert read[448 + i] == bfloat16(row[448 + 2 * i], row[449 + 2 * i])
        assert row[583] == 0
    assert packed[0, 576:583].tolist() == [127 - 22] * 7  # a zero group has the scale of the floor, 1e-4 / 448


@pytest.mark.parametrize("width", [32, 128])
def test_an_index_key_reads_back_as_the_fake_quantiser_rounds_it(width):
    x = wild(400, width, 32)
    packed = kv.pack_index_key(x)
    assert packed.shape == (400, kv.index_key_bytes(width))
    expected = fp8.fp4_act_fake_quant(x, 32)
    assert torch.equal(bits(kv.unpack_index_key(packed, width)), bits(expected))
    assert torch.equal(bits(kv.unpack_index_key(packed, width, torch.float32)), bits(expected.float()))
    for row, read in zip(packed[:20].tolist(), kv.unpack_index_key(packed, width)[:20].tolist(), strict=True):
        for channel in range(width):
            code = row[channel // 2] >> 4 * (channel % 2) & 15
            assert read[channel] == E2M1[code] * 2.0 ** (row[width // 2 + channel // 32] - 127)


def test_leading_dimensions_are_kept():
    x = entries(6, 80, 16).view(2, 3, 80)
    assert torch.equal(kv.pack_entry(x, 16), kv.pack_entry(x.view(6, 80), 16).view(2, 3, -1))
    assert kv.unpack_entry(kv.pack_entry(x, 16), 80, 16).shape == (2, 3, 80)
    assert kv.unpack_index_key(kv.pack_index_key(wild(6, 32, 32).view(2, 3, 32)), 32).shape == (2, 3, 32)
    assert kv.pack_entry(x[:0], 16).shape == (0, 3, 104)


def test_nan_and_infinity_stay_visible():
    for bad in (float("nan"), float("inf"), float("-inf")):
        x = torch.ones(1, 192).bfloat16()
        x[0, 5] = bad
        read = kv.unpack_entry(kv.pack_entry(x, 64), 192, 64)
        assert read[0, :64].isnan().all() and (read[0, 64:] == 1).all()
        read = kv.unpack_index_key(kv.pack_index_key(x[:, :64]), 64)
        assert read[0, :32].isnan().all() and (read[0, 32:] == 1).all()


def test_sizes_without_whole_groups_are_refused():
    with pytest.raises(KernelError, match="un-rotated part of an entry has last dimension 84; expected a multiple of"):
        kv.pack_entry(torch.ones(1, 100), 16)
    with pytest.raises(KernelError, match="index key has last dimension 48; expected a multiple of 32"):
        kv.pack_index_key(torch.ones(1, 48))
