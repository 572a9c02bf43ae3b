"""q_norm_rope: the norm has no weight and is computed in the dtype of q."""

import torch

from dsv4.kernels.q_norm_rope.q_norm_rope import q_norm_rope


def identity(rows):
    return torch.ones(rows, 32, dtype=torch.complex64)


def test_float32_equals_float64():
    q = torch.randn(4, 64, 512, generator=torch.Generator().manual_seed(0)) * 5
    true = q.double() / (q.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert (q_norm_rope(q, identity(4), 1e-6).double() - true).abs().max() < 5e-6


def test_bfloat16_rounds_square_mean_and_root_each():
    q = torch.randn(2, 3, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    square = (q.double() * q.double()).bfloat16()
    mean = square.double().mean(-1, keepdim=True).bfloat16()
    root = (1 / (mean + 1e-6).double().sqrt()).bfloat16()
    assert torch.equal(q_norm_rope(q, identity(2), 1e-6), (q.double() * root.double()).bfloat16())
