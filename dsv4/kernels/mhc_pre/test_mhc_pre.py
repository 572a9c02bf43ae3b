"""mhc_pre: SPEC's check matrix, double stochasticity, and a float64 walk through the definition."""

import pytest
import torch

from dsv4.kernels.mhc_pre.mhc_pre import mhc_pre
from dsv4.kernels.mhc_pre.mhc_pre_ref import sinkhorn_ref


def site(streams, width, rows=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    out = (2 + streams) * streams
    h = torch.randn(rows, streams, width, generator=g)
    fn = torch.randn(out, streams * width, generator=g) * (streams * width) ** -0.5
    return h, fn, torch.randn(out, generator=g), torch.tensor([0.7] * 4 + [1.3] * 4 + [0.9] * 16)


def test_sinkhorn_check_values():
    logits = torch.tensor([[-0.4, 0.3, -0.1, -0.2], [0, 0.1, -0.4, 0.3], [0.6, 0.1, 0.6, -0.7], [-0.56, 0.9, 1, 0.11]])
    expected = torch.tensor(
        [
            [0.213677, 0.300771, 0.209036, 0.276514],
            [0.271114, 0.209437, 0.131708, 0.387740],
            [0.410266, 0.173937, 0.297332, 0.118464],
            [0.104941, 0.315853, 0.361924, 0.217281],
        ]
    )
    assert (sinkhorn_ref(logits.double().unsqueeze(0), 20, 1e-6) - expected).abs().max() < 1e-6
    assert (sinkhorn_ref(logits.unsqueeze(0), 20, 1e-6) - expected).abs().max() < 2e-6


@pytest.mark.parametrize("width", [96, 4096, 7168])
def test_equals_float64(width):
    h, fn, base, scale = site(4, width)
    x, post, comb = mhc_pre(h, fn, base, scale, sinkhorn_iters=20, hc_eps=1e-6, norm_eps=1e-6)
    for t in range(len(h)):
        v = h[t].double().flatten()
        z = (fn.double() @ v) / (v.square().mean() + 1e-6).sqrt()
        pre = torch.sigmoid(z[:4] * scale[0].double() + base[:4]) + 1e-6
        assert (x[t].double() - pre @ h[t].double()).abs().max() < 2e-5
        assert (post[t].double() - 2 * torch.sigmoid(z[4:8] * scale[4].double() + base[4:8])).abs().max() < 2e-6
        c = torch.softmax((z[8:] * scale[8].double() + base[8:]).view(4, 4), dim=1) + 1e-6
        c = c / (c.sum(0) + 1e-6)
        for _ in range(19):
            c = c / (c.sum(1, keepdim=True) + 1e-6)
            c = c / (c.sum(0) + 1e-6)
        assert (comb[t].double() - c).abs().max() < 2e-6


def test_comb_is_doubly_stochastic():
    h, fn, base, scale = site(4, 4096, rows=64, seed=3)
    base = (
        base * 0.3
    )  # 20 iterations reach 1e-5 on rows only when the logits are not extreme; columns come last and always do
    _, _, comb = mhc_pre(h, fn, base, scale * 0.3, sinkhorn_iters=20, hc_eps=1e-6, norm_eps=1e-6)
    assert (comb.sum(1) - 1).abs().max() < 1e-5
    assert (comb.sum(2) - 1).abs().max() < 1e-5


def test_bfloat16_streams_are_mixed_in_float32():
    h, fn, base, scale = site(4, 512)
    exact, _, _ = mhc_pre(h.bfloat16().float(), fn, base, scale, sinkhorn_iters=20, hc_eps=1e-6, norm_eps=1e-6)
    x, _, _ = mhc_pre(h.bfloat16(), fn, base, scale, sinkhorn_iters=20, hc_eps=1e-6, norm_eps=1e-6)
    assert torch.equal(x, exact.bfloat16())


@pytest.mark.parametrize("spread", [0.1, 1, 10, 100])
def test_one_row_has_the_bits_it_has_among_others(spread):
    logits = spread * torch.randn(200, 4, 4, generator=torch.Generator().manual_seed(5))
    alone = torch.cat([sinkhorn_ref(row, 20, 1e-6) for row in logits.split(1)])
    assert torch.equal(alone, sinkhorn_ref(logits, 20, 1e-6))
    assert sinkhorn_ref(torch.full((1, 4, 4), torch.nan), 20, 1e-6).isnan().all()
