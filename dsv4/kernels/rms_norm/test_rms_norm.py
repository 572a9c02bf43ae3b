"""rms_norm against float64; widths are V4's (hidden 4096/7168, q_lora 1024/1536, kv 512, index 128)."""

import pytest
import torch

from dsv4.errors import KernelError
from dsv4.kernels.rms_norm.rms_norm import rms_norm


@pytest.mark.parametrize("width", [128, 512, 1024, 1536, 4096, 7168])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_float64(width, dtype):
    g = torch.Generator().manual_seed(width)
    x = (torch.randn(5, width, generator=g) * 3).to(dtype)
    w = torch.randn(width, generator=g)
    x64 = x.double()
    true = x64 / (x64.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w.double()
    bound = 2e-6 if dtype == torch.float32 else 2**-8  # a few float32 roundings; half an ulp of BF16 is 2^-9
    assert ((rms_norm(x, w, 1e-6).double() - true).abs() <= bound * true.abs() + 1e-12).all()


def test_zero_row_is_zero_and_empty_is_empty():
    assert (rms_norm(torch.zeros(1, 8), torch.ones(8), 1e-6) == 0).all()
    assert rms_norm(torch.zeros(0, 8), torch.ones(8), 1e-6).shape == (0, 8)


def test_wrong_width_names_the_argument():
    with pytest.raises(KernelError, match=r"rms_norm: 'weight' has N = 4 where N = 8"):
        rms_norm(torch.zeros(1, 8), torch.ones(4), 1e-6)


def test_out_receives_the_result():
    x, out = torch.randn(2, 8), torch.full((2, 8), float("nan"))
    assert rms_norm(x, torch.ones(8), 1e-6, out=out) is out
    assert torch.equal(out, rms_norm(x, torch.ones(8), 1e-6))
