"""rope against a float64 rotation written per pair."""

import math

import pytest
import torch

from dsv4.kernels.rope.rope import rope


def cis_of(positions, freqs):
    angle = torch.outer(torch.tensor(positions).float(), torch.tensor(freqs))
    return torch.polar(torch.ones_like(angle), angle)


@pytest.mark.parametrize("shape", [(3, 512), (3, 64, 512), (3, 64, 128)])
def test_rotates_adjacent_pairs_of_the_last_channels(shape):
    positions, freqs = [0, 7, 1000], [10000 ** (-2 * i / 64) for i in range(32)]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    got = rope(x.clone(), cis_of(positions, freqs))
    true = x.double().clone()
    for t, p in enumerate(positions):
        for i, f in enumerate(freqs):
            angle = float(torch.tensor(float(p)) * torch.tensor(f))  # the float32 product is the contract
            a, b = x[t, ..., -64 + 2 * i].double(), x[t, ..., -63 + 2 * i].double()
            true[t, ..., -64 + 2 * i] = a * math.cos(angle) - b * math.sin(angle)
            true[t, ..., -63 + 2 * i] = a * math.sin(angle) + b * math.cos(angle)
    assert torch.equal(got[..., :-64], x[..., :-64])
    assert (got.double() - true).abs().max() < 2e-6


def test_the_conjugate_undoes_it_and_position_zero_is_identity():
    x = torch.randn(2, 4, 96)
    cis = cis_of([0, 31], [1.0, 0.1, 0.01, 0.001])
    turned = rope(x.clone(), cis)
    assert torch.equal(turned[0], x[0])
    assert (turned[1] - x[1]).abs().max() > 0.1
    assert (rope(turned, cis.conj_physical()) - x).abs().max() < 1e-6
