"""kv_append: norm, RoPE, FP8 of the un-rotated channels, and the ring write that touches nothing else."""

import pytest
import torch

from dsv4.kernels.kv_append.kv_append import kv_append
from dsv4.quant import kv as formats


def e4m3_values():
    return torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()


def fake_quant_by_search(x):
    """SPEC's act_quant by nearest value in the code table, group of 64."""
    a = max(float(x.abs().max()), 1e-4)
    s = 2.0 ** torch.ceil(torch.log2(torch.tensor(a, dtype=torch.float64) / 448)).item()
    table = e4m3_values()
    table = torch.cat([-table.flip(0), table])
    return table[(x.double().unsqueeze(-1) / s - table).abs().argmin(-1)] * s


@pytest.mark.parametrize("quantize", [False, True])
def test_entry_and_ring(quantize):
    g = torch.Generator().manual_seed(2)
    kv, w = torch.randn(5, 512, generator=g) * 2, torch.rand(512, generator=g) + 0.5
    angle = torch.outer(torch.arange(5.0), torch.logspace(0, -3, 32))
    cis = torch.polar(torch.ones_like(angle), angle)
    ring = torch.full((2, 8, 512), 7.0)
    write_rows, write_to = torch.tensor([3, 4]), torch.tensor([11, 12])
    entry = kv_append(kv, w, cis, ring, write_rows, write_to, eps=1e-6, quantize=quantize)

    kv64 = kv.double()
    true = kv64 / (kv64.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w.double()
    pairs = torch.view_as_complex(true[:, 448:].unflatten(-1, (-1, 2)).contiguous())
    true[:, 448:] = torch.view_as_real(pairs * cis.to(torch.complex128)).flatten(-2)
    if quantize:
        for t in range(5):
            for first in range(0, 448, 64):
                true[t, first : first + 64] = fake_quant_by_search(true[t, first : first + 64])
    # A value within float32 noise of a rounding midpoint may go the other way: none does with this seed.
    assert (entry.double() - true).abs().max() < 1e-5
    flat = ring.view(-1, 512)
    assert torch.equal(flat[11:13], entry[3:5])
    assert (flat[:11] == 7).all() and (flat[13:] == 7).all()


def test_bfloat16_entries_are_exact_e4m3_values():
    kv = torch.randn(3, 128).bfloat16()
    ring = torch.zeros(1, 4, 128, dtype=torch.bfloat16)
    rows = torch.arange(3)
    identity = torch.ones(3, 32, dtype=torch.complex64)
    entry = kv_append(kv, torch.ones(128), identity, ring, rows, rows, eps=1e-6, quantize=True)
    scale = 2.0 ** torch.ceil(torch.log2(entry[:, :64].double().abs().amax(-1, keepdim=True) / 448))
    ratio = entry[:, :64].double() / scale
    assert torch.equal(ratio.to(torch.float8_e4m3fn).double(), ratio)
    assert torch.equal(ring[0, :3], entry)


def test_a_packed_ring_takes_the_same_values_and_row_minus_one_writes_nothing():
    kv, weight = torch.randn(4, 192, generator=torch.Generator().manual_seed(4)).bfloat16(), torch.ones(192)
    cis = torch.polar(torch.ones(4, 32), torch.randn(4, 32, generator=torch.Generator().manual_seed(5)))
    rows, to = torch.arange(4), torch.tensor([5, -1, 0, -1])
    plain = torch.full((2, 8, 192), 7.0).bfloat16()
    packed = torch.full((2, 8, formats.entry_bytes(192, 64)), 99, dtype=torch.uint8)
    entry = kv_append(kv, weight, cis, plain, rows, to, eps=1e-6, quantize=True)
    held = kv_append(kv, weight, cis, packed, rows, to, eps=1e-6, quantize=True)
    assert torch.equal(formats.unpack_entry(held, 192, 64), entry)
    flat, bytes_ = plain.view(16, 192), packed.view(16, -1)
    for row in range(16):
        written = {5: 0, 0: 2}.get(row)
        if written is None:
            assert (flat[row] == 7).all() and (bytes_[row] == 99).all()
        else:
            assert torch.equal(flat[row], entry[written]) and torch.equal(bytes_[row], held[written])
