"""grouped_linear (wo_a): block-diagonal, groups of consecutive heads."""

import pytest
import torch

from dsv4.errors import KernelError
from dsv4.kernels.grouped_linear.grouped_linear import grouped_linear
from dsv4.kernels.grouped_linear.operand import grouped_operand
from dsv4.quant import nvfp4
from dsv4.quant.weights import FP8Weight, NVFP4Weight, PlainWeight


@pytest.mark.parametrize(
    ("groups", "rank", "width"), [(8, 1024, 512), (16, 32, 64), (2, 24, 240)]
)  # 8 groups of 1024: Flash
def test_equals_one_product_per_group(groups, rank, width):
    g = torch.Generator().manual_seed(groups)
    w, o = torch.randn(groups * rank, width, generator=g) * width**-0.5, torch.randn(3, groups * width, generator=g)
    got = grouped_linear(o, grouped_operand(PlainWeight(w), groups, act="fp8"))
    for i in range(groups):
        true = o[:, i * width : (i + 1) * width].double() @ w[i * rank : (i + 1) * rank].double().T
        assert (got[:, i * rank : (i + 1) * rank].double() - true).abs().max() < 1e-5


def test_fp8_weights_meet_plain_inputs_and_nvfp4_weights_quantised_rows():
    w, o = torch.randn(64, 128) * 0.1, torch.randn(2, 256)
    plain = FP8Weight.quantize(w)
    assert torch.equal(*(grouped_linear(o, grouped_operand(plain, 2, act=a)) for a in ("bf16", "fp8")))
    four = NVFP4Weight.quantize(w)
    rows = nvfp4.dequantize(*nvfp4.quantize(o.view(2, 2, 128), per_row=True), dtype=torch.float64)
    true = torch.einsum("tgk,grk->tgr", rows, four.dequantize(torch.float64).view(2, 32, 128)).flatten(1)
    assert (grouped_linear(o, grouped_operand(four, 2, act="nvfp4")).double() - true).abs().max() < 1e-5


def test_rows_that_do_not_split_are_refused():
    with pytest.raises(KernelError, match="10 rows of wo_a do not split into o_groups = 4"):
        grouped_operand(PlainWeight(torch.zeros(10, 8)), 4, act="bf16")
