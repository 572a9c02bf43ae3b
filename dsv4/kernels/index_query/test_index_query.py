"""index_query: RoPE, then the Hadamard transform and E2M1 rounding, against an explicit matrix and code search."""

import torch

from dsv4.kernels.index_query.index_query import index_query


def hadamard_matrix(n):
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h * n**-0.5


def test_equals_matrix_and_search():
    q = torch.randn(2, 8, 128, generator=torch.Generator().manual_seed(0)) * 3
    identity = torch.ones(2, 32, dtype=torch.complex64)
    got = index_query(q, identity, quantize=True).double()
    y = (q.double() @ hadamard_matrix(128)).unflatten(-1, (4, 32))
    s = 2.0 ** torch.ceil(torch.log2(y.abs().amax(-1, keepdim=True) / 6))
    codes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    codes = torch.cat([-codes.flip(0), codes])
    true = codes[(y.unsqueeze(-1) / s.unsqueeze(-1) - codes).abs().argmin(-1)] * s
    assert (got - true.flatten(-2)).abs().max() < 1e-6


def test_unquantised_is_rope_alone():
    q = torch.randn(3, 8, 128)
    assert torch.equal(index_query(q, torch.ones(3, 32, dtype=torch.complex64), quantize=False), q)
