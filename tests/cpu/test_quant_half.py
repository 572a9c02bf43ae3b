"""Products with FP16 weights: the exact factors, float32 accumulation, a row's bits its own, and what is refused."""

import platform

import pytest
import torch
from torch import Tensor

from dsv4.kernels.linear.operand import dense
from dsv4.quant import half
from dsv4.quant.weights import NVFP4Weight, PlainWeight

SHAPES = [(8, 256), (256, 128), (130, 70), (1, 1), (3, 1000), (640, 512)]


def matrix(rows: int, columns: int, smallest: float = 2.0**-14, seed: int = 0) -> Tensor:
    """BF16 values whose magnitudes run from `smallest` to 1."""
    g = torch.Generator().manual_seed(seed)
    exponents = torch.rand(rows, columns, generator=g).mul_(torch.tensor(smallest).log2()).exp2_()
    return (exponents * torch.randn(rows, columns, generator=g).sign()).bfloat16()


def worst(found: Tensor, x: Tensor, w: Tensor) -> float:
    """The largest error against float64, in units of what float32 summation of K terms may lose."""
    x, w = x.double(), w.double()
    bound = (x.abs() @ w.abs().T) * w.shape[1] * 2.0**-24 + 1e-300
    return float(((found.double() - x @ w.T).abs() / bound).max())


def test_the_pinned_torch_has_it() -> None:
    assert half.available() or platform.machine() not in ("x86_64", "AMD64")


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("smallest", [2.0**-14, 2.0**-28], ids=["as it is", "scaled"])
def test_equals_float64(rows: int, columns: int, smallest: float) -> None:
    w = matrix(rows, columns, smallest)
    w[0, 0] = smallest * 1.9921875  # eight significant bits: below 2^-16 lost in FP16 unless scaled
    packed = half.pack(w)
    x = torch.randn(33, columns, generator=torch.Generator().manual_seed(1))
    if not half.available():
        assert packed is None
        return
    assert packed is not None and (packed.factor is None) == (smallest == 2.0**-14)
    assert worst(packed.matmul(x), x, w) < 1
    assert packed.matmul(x.view(3, 11, columns)).shape == (3, 11, rows)
    if packed.factor is not None:
        assert float(packed.factor).hex().startswith("0x1.0000000000000p")


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_a_row_has_the_same_bits_alone_and_among_others(rows: int, columns: int) -> None:
    w = dense(PlainWeight(matrix(rows, columns)))
    x = torch.randn(40, columns, generator=torch.Generator().manual_seed(2))
    if half.available():
        every = w.matmul(x, half=True)
        for count in (1, 2, 7, 15):
            assert torch.equal(torch.cat([w.matmul(part, half=True) for part in x.split(count)]), every)


def test_what_fp16_cannot_hold_is_multiplied_in_float32() -> None:
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))  # 24 bits
    assert half.pack(w) is None
    assert half.pack(torch.tensor([[1.0, 2.0**-60]])) is None
    assert half.pack(torch.tensor([[torch.nan, 1.0]])) is None
    x = torch.randn(2, 64)
    assert torch.equal(dense(PlainWeight(w)).matmul(x, half=True), torch.nn.functional.linear(x, w))


def test_without_fbgemm_the_product_is_that_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "fbgemm_pack_gemm_matrix_fp16", raising=False)
    w, x = matrix(16, 64), torch.randn(2, 64)
    assert not half.available()
    assert torch.equal(dense(PlainWeight(w)).matmul(x, half=True), torch.nn.functional.linear(x, w.float()))


def test_much_work_on_several_threads_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    for threads, expected in ((1, True), (2, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert half.pays(half.ONE_THREAD)
        assert half.pays(half.ONE_THREAD + 1) is expected


def test_experts_and_the_global_of_nvfp4() -> None:
    weight = NVFP4Weight.quantize(torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(4)))
    w, x = dense(weight), torch.randn(5, 64)
    assert w.alpha is not None
    for e in range(3):
        assert worst(w.matmul(x, e, half=True), x, weight.select(e).dequantize(torch.float64)) < 1.1


def test_nan_and_inf_come_through() -> None:
    w = dense(PlainWeight(matrix(16, 64)))
    x = torch.randn(3, 64)
    x[0, 3], x[1, 5] = torch.nan, torch.inf
    y = w.matmul(x, half=True)
    assert y[0].isnan().all() and not y[1].isfinite().any() and y[2].isfinite().all()
