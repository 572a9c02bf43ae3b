"""mhc_post against an explicit double loop; the first index of comb is summed."""

import pytest
import torch

from dsv4.kernels.mhc_post.mhc_post import mhc_post


@pytest.mark.parametrize(("streams", "width"), [(4, 4096), (4, 7168), (2, 5)])
def test_equals_loops(streams, width):
    g = torch.Generator().manual_seed(width)
    y, h = torch.randn(3, width, generator=g), torch.randn(3, streams, width, generator=g)
    post, comb = torch.rand(3, streams, generator=g), torch.rand(3, streams, streams, generator=g)
    got = mhc_post(y, h, post, comb)
    for t in range(3):
        for k in range(streams):
            true = post[t, k].double() * y[t].double()
            for j in range(streams):
                true = true + comb[t, j, k].double() * h[t, j].double()
            assert (got[t, k].double() - true).abs().max() < 1e-5


def test_bfloat16_is_rounded_once():
    g = torch.Generator().manual_seed(0)
    y, h = torch.randn(2, 64, generator=g).bfloat16(), torch.randn(2, 4, 64, generator=g).bfloat16()
    post, comb = torch.rand(2, 4, generator=g), torch.rand(2, 4, 4, generator=g)
    assert torch.equal(mhc_post(y, h, post, comb), mhc_post(y.float(), h.float(), post, comb).bfloat16())
