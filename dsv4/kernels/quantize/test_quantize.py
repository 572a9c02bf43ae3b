"""The quantising ops: bytes against a search over all codes, values against what linear's twin multiplies."""

import pytest
import torch

from dsv4.errors import KernelError
from dsv4.kernels.quantize.quantize import quantize
from dsv4.kernels.quantize.quantize_act import quantize_act
from dsv4.kernels.quantize.swiglu_quantize import swiglu_quantize
from dsv4.quant.activations import treat
from dsv4.quant.formats import E2M1_VALUES, unpack_nibbles


def rows(t, k, seed=0):
    return (torch.randn(t, k, generator=torch.Generator().manual_seed(seed)) * 3).bfloat16()


def test_every_code_is_the_nearest():
    x = rows(4, 96)
    codes, scales, globals_ = quantize(x)
    assert (codes.shape, scales.shape, globals_.shape) == ((4, 48), (4, 6), (4,))
    assert torch.equal(globals_, x.float().abs().amax(-1) / 2688)
    step = scales.double().repeat_interleave(16, -1) * globals_.double().unsqueeze(-1)
    distance = (x.double().unsqueeze(-1) - step.unsqueeze(-1) * torch.tensor(E2M1_VALUES).double()).abs()
    chosen = distance.gather(-1, unpack_nibbles(codes).long().unsqueeze(-1)).squeeze(-1)
    assert (chosen <= distance.amin(-1) * (1 + 1e-5)).all()


@pytest.mark.parametrize("how", ["none", "fp8", "nvfp4"])
def test_values_and_scale_are_what_a_product_sees(how):
    x = rows(5, 256)
    values, row_scale = quantize_act(x, how)
    assert values.dtype == torch.bfloat16
    seen = values.float() if row_scale is None else values.float() * row_scale.unsqueeze(-1)
    assert torch.equal(seen, treat(x, how))


def test_values_hold_the_operand_bytes():
    x = rows(3, 64)
    codes, scales, globals_ = quantize(x)
    values, row_scale = quantize_act(x, "nvfp4")
    table = torch.tensor(E2M1_VALUES)
    exact = table[unpack_nibbles(codes).long()].double() * scales.double().repeat_interleave(16, -1)
    assert torch.equal(values.double(), exact)
    assert torch.equal(row_scale, globals_)


@pytest.mark.parametrize("how", ["none", "fp8", "nvfp4"])
def test_swiglu_comes_before_the_scales(how):
    both, weights = rows(4, 128, 1) * 8, torch.tensor([0.5, 1.0, 2.0, 0.0])
    for gate, up in (both.chunk(2, -1), (both[:, ::2], both[:, 1::2])):
        g, u = gate.double().clamp(max=10), up.double().clamp(-10, 10)
        a = (g * torch.sigmoid(g) * u * weights.double().unsqueeze(-1)).bfloat16()
        values, row_scale = swiglu_quantize(gate, up, weights, how, limit=10.0)
        expected, expected_scale = quantize_act(a, how)
        assert torch.allclose(values.float(), expected.float(), rtol=0.01, atol=0)
        assert (row_scale is None) == (expected_scale is None)


def test_a_row_of_nan_or_inf_decodes_to_nan():
    x = rows(3, 64)
    x[0, 5], x[1, 9] = float("nan"), float("inf")
    values, row_scale = quantize_act(x, "nvfp4")
    seen = values.float() * row_scale.unsqueeze(-1)
    assert seen[:2].isnan().all()
    assert seen[2].isfinite().all()


def test_ragged_groups_are_refused():
    with pytest.raises(KernelError, match="multiple of 16"):
        quantize(rows(2, 40))
