"""swiglu against float64, and where the clamp bites."""

import math

import torch

from dsv4.kernels.swiglu.swiglu import swiglu


def test_equals_float64_on_both_sides_of_the_clamp():
    values = torch.tensor([[-50.0, -10.0, -1.0, 0.0, 1.0, 9.99, 10.0, 10.01, 80.0]])
    gate, up = values.T.expand(9, 9).contiguous(), values.expand(9, 9).contiguous()
    got = swiglu(gate, up, 10.0)
    for i in range(9):
        for j in range(9):
            g, u = min(float(values[0, i]), 10.0), max(-10.0, min(float(values[0, j]), 10.0))
            assert math.isclose(float(got[i, j]), g / (1 + math.exp(-g)) * u, rel_tol=1e-5, abs_tol=1e-6)


def test_limit_zero_does_not_clamp():
    assert float(swiglu(torch.tensor([[50.0]]), torch.tensor([[50.0]]), 0.0)) == 2500.0
