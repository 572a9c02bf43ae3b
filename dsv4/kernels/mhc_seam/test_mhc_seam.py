"""mhc_seam against a float64 walk through the definition, and bit for bit against the three ops apart."""

import pytest
import torch

from dsv4.kernels.mhc_post.mhc_post import mhc_post
from dsv4.kernels.mhc_pre.mhc_pre import mhc_pre
from dsv4.kernels.mhc_seam.mhc_seam import mhc_seam
from dsv4.kernels.rms_norm.rms_norm import rms_norm

HOW = {"sinkhorn_iters": 20, "hc_eps": 1e-6, "norm_eps": 1e-6}


def arguments(rows, width, dtype=torch.float32):
    g = torch.Generator().manual_seed(width)
    y, h = torch.randn(rows, width, generator=g).to(dtype), torch.randn(rows, 4, width, generator=g).to(dtype)
    post, comb = torch.rand(rows, 4, generator=g) * 2, torch.rand(rows, 4, 4, generator=g) / 2
    fn = torch.randn(24, 4 * width, generator=g) * (4 * width) ** -0.5
    scale = torch.tensor([0.7] * 4 + [1.3] * 4 + [0.9] * 16)
    return y, h, post, comb, fn, torch.randn(24, generator=g), scale, torch.randn(width, generator=g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [96, 4096])
def test_is_the_three_ops_in_order(width, dtype):
    y, h, post, comb, fn, base, scale, weight = arguments(3, width, dtype)
    found = mhc_seam(y, h, post, comb, fn, base, scale, weight, **HOW)
    streams = mhc_post(y, h, post, comb)
    x, new_post, new_comb = mhc_pre(streams, fn, base, scale, **HOW)
    for a, b in zip(found, (streams, rms_norm(x, weight, 1e-6), new_post, new_comb), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("width", [96, 4096, 7168])
def test_equals_float64(width):
    args = arguments(2, width)
    found = mhc_seam(*args, **HOW)
    y, h, post, comb, fn, base, scale, weight = (arg.double() for arg in args)
    for t in range(len(y)):
        new = torch.stack([post[t, k] * y[t] + sum(comb[t, j, k] * h[t, j] for j in range(4)) for k in range(4)])
        v = new.flatten()
        z = (fn @ v) / (v.square().mean() + 1e-6).sqrt() * scale + base
        x = (torch.sigmoid(z[:4]) + 1e-6) @ new
        c = torch.softmax(z[8:].view(4, 4), dim=1) + 1e-6
        c = c / (c.sum(0) + 1e-6)
        for _ in range(19):
            c = c / (c.sum(1, keepdim=True) + 1e-6)
            c = c / (c.sum(0) + 1e-6)
        truth = new, x / (x.square().mean() + 1e-6).sqrt() * weight, 2 * torch.sigmoid(z[4:8]), c
        for a, b in zip(found, truth, strict=True):
            assert (a[t].double() - b).abs().max() < 3e-5
