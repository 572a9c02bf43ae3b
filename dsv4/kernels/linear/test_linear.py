"""linear: every stored format and activation mode against float64 of the operands it says it multiplies."""

import pytest
import torch

from dsv4.errors import KernelError
from dsv4.kernels.linear.linear import linear
from dsv4.kernels.linear.operand import Projection, linear_operand
from dsv4.quant import fp8, nvfp4
from dsv4.quant.activations import treatment
from dsv4.quant.weights import FP8Weight, MXFP4Weight, NVFP4Weight, PlainWeight

SHAPES = [
    (1024 + 512, 256),
    (2048, 512),
    (40, 128),
    (24, 96),
]  # Flash wq_a|wkv rows at a narrow K; shared expert; small, ragged


def weights_of(n, k, seed=0):
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * k**-0.5
    return {
        "nvfp4": NVFP4Weight.quantize(w),
        "mxfp4": MXFP4Weight.quantize(w),
        "fp8": FP8Weight.quantize(w),
        "bf16": PlainWeight(w.bfloat16()),
        "f32": PlainWeight(w),
    }


def seen_by_the_product(x, how):
    if how == "fp8":
        return fp8.act_fake_quant(x, 128).double()
    if how == "nvfp4":
        return nvfp4.dequantize(*nvfp4.quantize(x, per_row=True), dtype=torch.float64)
    return x.double()


@pytest.mark.parametrize("act", ["bf16", "fp8", "nvfp4"])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4", "fp8", "bf16", "f32"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_equals_float64_of_its_operands(act, format, n, k):
    w = weights_of(n, k)[format]
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(7)).bfloat16()
    (got,) = linear(x, linear_operand(w, act=act))
    true = seen_by_the_product(x, treatment(format, act)) @ w.dequantize(torch.float64).T
    slack = 2**-20 * x.double().abs() @ w.dequantize(torch.float64).abs().T  # float32 accumulation, before the rounding
    assert ((got.double() - true).abs() <= 2**-8 * true.abs() + slack).all()


def test_treatments():
    assert [treatment(f, "fp8") for f in ("nvfp4", "mxfp4", "fp8", "bf16", "f32")] == ["fp8"] * 3 + ["none"] * 2
    assert [treatment(f, "nvfp4") for f in ("nvfp4", "mxfp4", "fp8", "bf16", "f32")] == ["nvfp4", "nvfp4", "fp8"] + [
        "none"
    ] * 2
    assert {treatment(f, "bf16") for f in ("nvfp4", "mxfp4", "fp8", "bf16", "f32")} == {"none"}


def test_joined_projections_equal_single_ones():
    w = weights_of(40, 128)
    x = torch.randn(2, 128)
    joined = linear(x, linear_operand(*w.values(), act="nvfp4"))
    single = [linear(x, linear_operand(one, act="nvfp4"))[0] for one in w.values()]
    assert [j.shape for j in joined] == [(2, 40)] * 5
    assert all((j - s).abs().max() < 1e-5 for j, s in zip(joined, single, strict=True))


def test_a_row_does_not_depend_on_its_neighbours():
    w = weights_of(40, 128)["nvfp4"]
    x = torch.randn(4, 128)
    alone = linear(x[:1], linear_operand(w, act="nvfp4"))[0]
    x[1:] *= 1000
    assert (linear(x, linear_operand(w, act="nvfp4"))[0][:1] - alone).abs().max() < 1e-5


def test_a_plain_projection_ignores_the_mode_and_different_k_is_refused():
    w = weights_of(40, 128)["nvfp4"]
    x = torch.randn(2, 128)
    plain = Projection(w, plain=True)
    assert torch.equal(*(linear(x, linear_operand(plain, act=a))[0] for a in ("nvfp4", "bf16")))
    with pytest.raises(KernelError, match=r"must have one K, got \[64, 128\]"):
        linear_operand(w, PlainWeight(torch.zeros(4, 64)), act="bf16")


def test_outputs_keep_their_order_and_dtype():
    w = weights_of(24, 96)
    x = torch.randn(2, 96).bfloat16()
    mixed = linear_operand(Projection(w["nvfp4"], f32=True), w["bf16"], Projection(w["fp8"], plain=True), act="nvfp4")
    got = linear(x, mixed)
    assert [y.dtype for y in got] == [torch.float32, torch.bfloat16, torch.bfloat16]
    alone = [linear(x, linear_operand(p, act="nvfp4"))[0] for p in mixed.projections]
    assert all((a.float() - g.float()).abs().max() < 1e-5 for a, g in zip(alone, got, strict=True))
