"""mhc_head against float64."""

import pytest
import torch

from dsv4.kernels.mhc_head.mhc_head import mhc_head


@pytest.mark.parametrize("width", [96, 4096, 7168])
def test_equals_float64(width):
    g = torch.Generator().manual_seed(width)
    h, fn = torch.randn(3, 4, width, generator=g), torch.randn(4, 4 * width, generator=g) * (4 * width) ** -0.5
    base, scale = torch.randn(4, generator=g), torch.tensor([0.8])
    got = mhc_head(h, fn, base, scale, hc_eps=1e-6, norm_eps=1e-6)
    for t in range(3):
        v = h[t].double().flatten()
        z = (fn.double() @ v) / (v.square().mean() + 1e-6).sqrt()
        true = (torch.sigmoid(z * scale.double() + base.double()) + 1e-6) @ h[t].double()
        assert (got[t].double() - true).abs().max() < 2e-5
