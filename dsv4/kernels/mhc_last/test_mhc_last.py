"""mhc_last against a float64 walk through the definition, and bit for bit against the two ops apart."""

import pytest
import torch

from dsv4.kernels.case import Maker
from dsv4.kernels.mhc_last.cases import apart, arguments
from dsv4.kernels.mhc_last.mhc_last import mhc_last
from dsv4.kernels.mhc_seam.cases import echo

HOW = {"hc_eps": 1e-6, "norm_eps": 1e-6}
CPU = torch.device("cpu")


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("width", [96, 4096])
def test_is_the_two_ops_in_order(width, dtype, ranks):
    args = arguments(Maker(CPU), 3, width, dtype, dtype if ranks == 1 else "f32")
    peers = None if ranks == 1 else echo(1, ranks, CPU)
    for a, b in zip(mhc_last(*args, peers=peers, **HOW), apart(*args, peers=peers, **HOW), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("width", [96, 4096, 7168])
def test_equals_float64(width):
    args = arguments(Maker(CPU), 2, width, "f32", "f32")
    found = mhc_last(*args, **HOW)
    y, h, post, comb, fn, base, scale = (arg.double() for arg in args)
    for t in range(len(y)):
        new = torch.stack([post[t, k] * y[t] + sum(comb[t, j, k] * h[t, j] for j in range(4)) for k in range(4)])
        v = new.flatten()
        z = (fn @ v) / (v.square().mean() + 1e-6).sqrt() * scale + base
        for a, b in zip(found, (new, (torch.sigmoid(z) + 1e-6) @ new), strict=True):
            assert (a[t].double() - b).abs().max() < 3e-5
