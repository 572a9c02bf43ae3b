"""FP8 activation groups, weight blocks and fake quantisers against a float64 search over the code tables."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_quant_truth import E2M1, E4M3, around, ceil_pow2, nearest

from dsv4.errors import KernelError
from dsv4.quant import formats, fp8, mxfp4

DTYPES = [torch.float32, torch.bfloat16]
F32 = np.float32


def fp8_scale(amax: float) -> float:
    """SPEC 2.0: ceil of log2 of the float32 product with the float32 constant 1/448."""
    return ceil_pow2(float(max(F32(amax), F32(1e-4)) * F32(1 / 448)))


def fp4_scale(amax: float) -> float:
    """SPEC 2.0: from the quotient by 6, in float64, where a float32 that is no 6 * 2^k stays clear of the powers."""
    return ceil_pow2(max(amax, 6 * 2.0**-126) / 6)


def truth(x: torch.Tensor, group: int, scale_of: object, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(values, scales) in float64, group by group, the last one possibly short."""
    rows = x.float().double().reshape(-1, x.shape[-1]).numpy()
    starts = range(0, x.shape[-1], group)
    scales = np.array([[scale_of(np.abs(row[s : s + group]).max()) for s in starts] for row in rows])  # type: ignore[operator]
    wide = np.repeat(scales, group, axis=1)[:, : x.shape[-1]]
    return (nearest(rows / wide, table) * wide).reshape(x.shape), scales.reshape(*x.shape[:-1], -1)


def same_bits(a: torch.Tensor, b: np.ndarray) -> bool:
    """Equal values and equal signs of zeros."""
    return np.array_equal(a.double().numpy(), b) and np.array_equal(np.signbit(a.double().numpy()), np.signbit(b))


def inputs(dtype: torch.dtype) -> torch.Tensor:
    """Rows of very different size, exact zeros of both signs, a zero row, values that hit ties."""
    x = torch.randn(12, 192) * torch.logspace(-9, 9, 12).unsqueeze(1)
    x[3] = 0
    x[4, ::3] = -0.0
    x[5] = torch.randint(-60, 61, (192,)) / 16
    return x.to(dtype)


def test_check_value_of_the_specification() -> None:
    x = torch.tensor([0.011, -1.7, 3.3, 250.0])
    q, scale = fp8.act_quant(x)
    assert scale.tolist() == [1]
    expected = [0.01171875, -1.75, 3.25, 256]
    assert q.float().tolist() == expected
    assert fp8.act_fake_quant(x).tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [64, 128])  # 192 columns: whole groups of 64, a ragged last group of 128
def test_act_quant_equals_the_search(dtype: torch.dtype, group: int) -> None:
    x = inputs(dtype)
    values, scales = truth(x, group, fp8_scale, E4M3)
    q, scale = fp8.act_quant(x, group)
    assert (q.dtype, q.shape, scale.dtype) == (torch.float8_e4m3fn, x.shape, torch.float32)
    assert np.array_equal(scale.double().numpy(), scales)
    assert same_bits(q.double() * scale.double().repeat_interleave(group, -1)[:, : x.shape[-1]], values)
    fake = fp8.act_fake_quant(x, group)
    assert fake.dtype == dtype
    assert fake.is_contiguous()
    assert q.is_contiguous()
    assert same_bits(fake, values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [32, 128])
def test_fp4_act_fake_quant_equals_the_search(dtype: torch.dtype, group: int) -> None:
    x = inputs(dtype)
    fake = fp8.fp4_act_fake_quant(x, group)
    assert fake.dtype == dtype
    assert same_bits(fake, truth(x, group, fp4_scale, E2M1)[0])


def test_fp4_act_fake_quant_is_mxfp4_decoded() -> None:
    x = inputs(torch.bfloat16)
    assert torch.equal(fp8.fp4_act_fake_quant(x).float(), mxfp4.dequantize(*mxfp4.quantize(x)))


@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=70))
def test_fake_quant_of_any_float32_that_cannot_round_past_the_largest(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    assert same_bits(fp8.act_fake_quant(x, 64), truth(x, 64, fp8_scale, E4M3)[0])
    assert same_bits(fp8.fp4_act_fake_quant(x, 32), truth(x, 32, fp4_scale, E2M1)[0])


def test_a_value_that_rounds_past_the_largest_float32_becomes_inf() -> None:
    largest = torch.finfo(torch.float32).max
    for quant, group in ((fp8.act_fake_quant, 64), (fp8.fp4_act_fake_quant, 32)):
        assert quant(torch.tensor([largest]), group).item() == float("inf")


def test_scale_is_a_ceil_at_every_boundary_and_its_neighbours() -> None:
    for maximum, table, scale_of, quant in (
        (448, E4M3, fp8_scale, fp8.act_fake_quant),
        (6, E2M1, fp4_scale, fp8.fp4_act_fake_quant),
    ):
        x = torch.from_numpy(around(maximum * 2.0 ** np.arange(-12, 13))).unsqueeze(1)
        assert same_bits(quant(x), truth(x, 32, scale_of, table)[0])


def test_act_quant_scale_steps_between_448_and_the_next_float32() -> None:
    """Where 448 * 2^k lies is a statement about float32(1/448): the values alone would hide a scale one step off."""
    x = torch.from_numpy(around(448 * 2.0 ** np.arange(-12, 100))).unsqueeze(1)
    assert fp8.act_quant(x)[1].flatten().tolist() == [fp8_scale(float(a)) for a in x.flatten()]
    tile = torch.zeros(1, 128 * len(x))
    tile[0, ::128] = x.flatten()
    assert formats.e8m0_decode(fp8.quantize_block(tile)[1]).tolist() == [[fp8_scale(float(a)) for a in x.flatten()]]


def test_fp4_scale_is_that_of_the_quotient_at_every_power_and_its_neighbours() -> None:
    """Implementations differ in x / 6 or x * float32(1/6); the ceil sees no difference."""
    amax = torch.from_numpy(around(6 * 2.0 ** np.arange(-125, 125)))
    expected = [fp4_scale(float(a)) for a in amax]
    assert mxfp4.group_scale(amax).tolist() == expected
    assert [ceil_pow2(float(F32(a) / F32(6))) for a in amax.numpy()] == expected


def test_zero_group_takes_the_scale_of_the_floor_and_keeps_signs() -> None:
    x = torch.tensor([0.0, -0.0] * 64)
    q, scale = fp8.act_quant(x)
    assert scale.tolist() == [2.0**-22]  # 1e-4 / 448 = 2^-22.1, rounded up
    for result in (q.float(), fp8.act_fake_quant(x), fp8.fp4_act_fake_quant(x)):
        assert not result.any()
        assert torch.equal(torch.signbit(result), torch.signbit(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(dtype: torch.dtype) -> None:
    x = torch.empty(0, 448, dtype=dtype)
    q, scale = fp8.act_quant(x, 64)
    assert (q.shape, scale.shape) == ((0, 448), (0, 7))
    for fake in (fp8.act_fake_quant(x, 128), fp8.fp4_act_fake_quant(x)):
        assert (fake.shape, fake.dtype) == (x.shape, dtype)


def test_input_is_left_alone_and_may_be_strided() -> None:
    x = torch.randn(64, 40)
    before = x.clone()
    for view in (x.t(), x[:, ::2], x[1:2].expand(5, 40)):
        assert torch.equal(fp8.act_fake_quant(view, 16), fp8.act_fake_quant(view.contiguous(), 16))
        assert torch.equal(fp8.fp4_act_fake_quant(view, 32), fp8.fp4_act_fake_quant(view.contiguous(), 32))
    assert torch.equal(x, before)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    x = inputs(torch.bfloat16)
    together = fp8.act_fake_quant(x)
    assert all(torch.equal(fp8.act_fake_quant(x[i : i + 1]), together[i : i + 1]) for i in range(len(x)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_non_finite_element_stays_visible_and_check_refuses_it(bad: float) -> None:
    x = torch.randn(2, 256)
    x[0, 5] = bad
    q, scale = fp8.act_quant(x)
    assert (q[0, 5].float() * scale[0, 0]).isnan()
    for quant in (fp8.act_fake_quant, fp8.fp4_act_fake_quant):
        result = quant(x)
        assert result[0, 5].isnan()
        assert result[1].isfinite().all()
        with pytest.raises(KernelError, match=r"x: 1 of 512 values are NaN or Inf, the first at index \(0, 5\)"):
            quant(x, check=True)
    with pytest.raises(KernelError, match=r"layers\.3\.wkv: 1 of 512"):
        fp8.quantize_block(x, name="layers.3.wkv")


@pytest.mark.parametrize("shape", [(256, 128), (130, 200), (2, 128, 384), (1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_equal_the_search(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * torch.logspace(-12, 2, shape[-1])).to(dtype)
    data, scale = fp8.quantize_block(x)
    rows, columns = shape[-2:]
    assert (data.shape, scale.shape) == (x.shape, (*shape[:-2], -(-rows // 128), -(-columns // 128)))
    decoded = fp8.dequantize_block(data, scale)
    for index in np.ndindex(*scale.shape):
        *lead, i, j = index
        window = (*lead, slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
        tile = x[window].double().numpy()
        factor = ceil_pow2(float(F32(np.abs(tile).max()) * F32(1 / 448)))
        assert 2.0 ** (int(scale[index]) - 127) == factor
        assert same_bits(decoded[window], nearest(tile / factor, E4M3) * factor)
    for exact in (torch.bfloat16, torch.float64):
        assert torch.equal(fp8.dequantize_block(data, scale, dtype=exact).double(), decoded.double())


def test_zero_block_takes_scale_two_to_minus_126() -> None:
    data, scale = fp8.quantize_block(torch.zeros(128, 256))
    assert scale.tolist() == [[1, 1]]
    assert not fp8.dequantize_block(data, scale).any()


def test_float32_factors_are_applied_as_they_are() -> None:
    data = torch.randn(128, 256).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.3, 1.7]])
    expected = data.double() * scale.double().repeat_interleave(128, 1)
    assert torch.equal(fp8.dequantize_block(data, scale, dtype=torch.float64), expected)
    assert torch.equal(fp8.dequantize_block(data, scale), expected.float())
