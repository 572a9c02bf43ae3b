"""NVFP4 against a step-by-step float32 reference with searched roundings, and its operand bytes decoded by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_quant_truth import E2M1, E4M3, nearest_code

from dsv4.errors import KernelError
from dsv4.quant import nvfp4
from dsv4.quant.formats import unpack_nibbles
from dsv4.quant.layouts import swizzle_32_4_4

F32 = np.float32
ZERO_FLOOR = F32(2.0**-100) / F32(2688)


def reference(matrix: np.ndarray, global_scale: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes, scale bytes, global) of one float32 matrix [N, K], in the written order of float32 operations."""
    groups = matrix.reshape(len(matrix), -1, 16)
    amax = np.abs(groups).max(-1)
    if global_scale is None:
        global_scale = np.maximum(amax.max(), F32(2.0**-100)) / F32(2688)
    wide = np.maximum(global_scale, ZERO_FLOOR)
    scale = nearest_code(np.clip(amax / (wide * F32(6)), F32(2.0**-9), F32(448)), E4M3)
    step = E4M3[scale].astype(F32) * wide
    quotient = groups / step[..., None]
    codes = nearest_code(np.abs(quotient), E2M1) + 8 * np.signbit(quotient)
    return codes.reshape(matrix.shape), scale, np.asarray(global_scale)


def decode(codes: np.ndarray, scale: np.ndarray, global_scale: np.ndarray) -> np.ndarray:
    """float64 values of unpacked codes [N, K], scale bytes [N, K/16], global broadcastable to [N, K]."""
    values = np.where(codes & 8, -1.0, 1.0) * E2M1[codes & 7]
    return values * np.repeat(E4M3[scale], 16, axis=-1) * global_scale.astype(np.float64)


def inputs(dtype: torch.dtype) -> torch.Tensor:
    """[3, 20, 64]: rows of very different size, a zero group, a zero row, both zeros, quotients on ties."""
    x = torch.randn(3, 20, 64) * torch.logspace(-7, 3, 20).unsqueeze(1)
    x[0, 4, 16:32] = 0
    x[1, 5] = 0
    x[:, 6, ::3] = -0.0
    x[2] = torch.randint(-24, 25, (20, 64)) / 4
    x[2, 0, 0] = 6 * 448 / 64  # global 2^-6: scales and quotients are round numbers, many of them ties
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_per_tensor_equals_the_reference(dtype: torch.dtype) -> None:
    x = inputs(dtype)
    packed, scale, global_scale = nvfp4.quantize(x)
    assert (packed.dtype, scale.dtype, global_scale.dtype) == (torch.uint8, torch.float8_e4m3fn, torch.float32)
    assert (packed.shape, scale.shape, global_scale.shape) == ((3, 20, 32), (3, 20, 4), (3,))
    exact = nvfp4.dequantize(packed, scale, global_scale, torch.float64)
    for e in range(3):
        codes, bytes_, factor = reference(x[e].float().numpy())
        assert np.array_equal(unpack_nibbles(packed[e]).numpy(), codes)
        assert np.array_equal(scale[e].view(torch.uint8).numpy(), bytes_)
        assert global_scale[e].item() == factor
        assert np.array_equal(exact[e].numpy(), decode(codes, bytes_, factor))


def test_per_row_is_each_row_by_itself() -> None:
    x = inputs(torch.bfloat16)
    codes, scale, global_scale = nvfp4.quantize(x, per_row=True)
    assert global_scale.shape == (3, 20)
    together = nvfp4.dequantize(codes, scale, global_scale)
    for e, row in np.ndindex(3, 20):
        alone = nvfp4.quantize(x[e, row : row + 1])
        assert torch.equal(alone[0][0], codes[e, row])
        assert torch.equal(alone[1][0].view(torch.uint8), scale[e, row].view(torch.uint8))
        assert alone[2] == global_scale[e, row]
        assert torch.equal(nvfp4.dequantize(*alone)[0], together[e, row])


@pytest.mark.parametrize("per_row", [False, True])
def test_a_given_global_is_used_and_saturates(per_row: bool) -> None:
    x = torch.randn(2, 6, 32)
    given_scale = torch.full((2, 6) if per_row else (2,), 0.0004)  # 2688 * 0.0004 = 1.08: some values lie beyond
    codes, scale, returned = nvfp4.quantize(x, per_row=per_row, global_scale=given_scale)
    assert returned is given_scale
    for e in range(2):
        expected, bytes_, _ = reference(x[e].numpy(), F32(0.0004))
        assert np.array_equal(unpack_nibbles(codes[e]).numpy(), expected)
        assert np.array_equal(scale[e].view(torch.uint8).numpy(), bytes_)
    assert nvfp4.dequantize(codes, scale, returned).abs().max() <= 2688 * 0.0004


@given(
    st.lists(st.floats(-(2.0**120), 2.0**120, width=32, allow_subnormal=False), min_size=32, max_size=32),
    st.integers(0, 31),
)
def test_every_value_is_the_nearest_its_scale_allows(values: list[float], where: int) -> None:
    """Without repeating the formulas: each value is the nearest on its group's grid, to the rounding of a division."""
    values[where] = max(values[where], 2.0**-90)
    x = torch.tensor([values], dtype=torch.float32)
    codes, scale, global_scale = nvfp4.quantize(x)
    decoded = nvfp4.dequantize(codes, scale, global_scale, torch.float64).reshape(2, 16, 1).numpy()
    step = (scale.double() * global_scale.double()).reshape(2, 1, 1).numpy()
    target = x.double().reshape(2, 16, 1).numpy()
    best = np.abs(target - np.concatenate([step * E2M1, -step * E2M1], axis=-1)).min(-1, keepdims=True)
    assert (np.abs(target - decoded) <= best + np.abs(target) * 2.0**-22).all()


def test_the_group_with_the_maximum_gets_scale_448() -> None:
    for _ in range(50):
        scale = nvfp4.quantize(torch.randn(8, 64))[1].float()
        assert scale.max() == 448


def test_float32_rounds_once_and_bfloat16_is_exact_with_a_power_of_two_global() -> None:
    codes, scale, global_scale = nvfp4.quantize(torch.randn(16, 64))
    exact = nvfp4.dequantize(codes, scale, global_scale, torch.float64)
    assert torch.equal(nvfp4.dequantize(codes, scale, global_scale), exact.float())
    power = torch.tensor(2.0**-9)
    exact = nvfp4.dequantize(codes, scale, power, torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(nvfp4.dequantize(codes, scale, power, dtype).double(), exact)


def test_zero_group_has_scale_byte_1_and_decodes_to_signed_zeros() -> None:
    x = torch.randn(2, 48)
    x[0, 16:32] = 0
    x[0, 20] = -0.0
    codes, scale, global_scale = nvfp4.quantize(x)
    assert scale[0, 1].view(torch.uint8) == 1
    zeros = nvfp4.dequantize(codes, scale, global_scale)[0, 16:32]
    assert not zeros.any()
    assert torch.equal(torch.signbit(zeros), torch.signbit(x[0, 16:32]))


def test_zero_tensor_and_zero_row_have_a_positive_global_and_no_nan() -> None:
    x = torch.zeros(2, 3, 32)
    x[1, 0] = torch.randn(32)
    for per_row in (False, True):
        codes, scale, global_scale = nvfp4.quantize(x, per_row=per_row)
        assert (global_scale > 0).all()
        assert global_scale.flatten()[0] == 2.0**-100 / 2688
        decoded = nvfp4.dequantize(codes, scale, global_scale)
        assert not decoded[0].any()
        assert not decoded[1, 1:].any()
        assert decoded[1, 0].any()


def test_global_zero_decodes_to_zeros_without_nan() -> None:
    for x in (torch.zeros(2, 32), torch.randn(2, 32)):
        codes, scale, global_scale = nvfp4.quantize(x, global_scale=torch.tensor(0.0))
        assert not nvfp4.dequantize(codes, scale, global_scale).any()


def test_no_rows() -> None:
    for lead in ((), (3,)):
        x = torch.empty(*lead, 0, 64)
        codes, scale, global_scale = nvfp4.quantize(x)
        assert (codes.shape, scale.shape, global_scale.shape) == ((*lead, 0, 32), (*lead, 0, 4), lead)
        assert global_scale.isfinite().all()
        assert nvfp4.dequantize(codes, scale, global_scale).shape == x.shape
        assert nvfp4.quantize(x, per_row=True)[2].shape == (*lead, 0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_stays_visible_and_check_refuses_it(bad: float) -> None:
    x = torch.randn(2, 32)
    x[1, 3] = bad
    codes, scale, global_scale = nvfp4.quantize(x, per_row=True)
    decoded = nvfp4.dequantize(codes, scale, global_scale)
    assert decoded[0].isfinite().all()
    assert not decoded[1].isfinite().any()
    with pytest.raises(KernelError, match="w1: 1 of 64 values are NaN or Inf"):
        nvfp4.quantize(x, check=True, name="w1")


def test_ragged_groups_and_wrong_globals_are_refused() -> None:
    with pytest.raises(KernelError, match="x has last dimension 40; expected a multiple of 16"):
        nvfp4.quantize(torch.zeros(2, 40))
    codes, scale, _ = nvfp4.quantize(torch.zeros(4, 2, 32))
    for shape in ((), (1,), (2,), (4, 1)):
        message = rf"global scale has shape \({', '.join(map(str, shape))},?\); expected \(4,\) .* or \(4, 2\)"
        with pytest.raises(KernelError, match=message):
            nvfp4.dequantize(codes, scale, torch.ones(shape))
        with pytest.raises(KernelError, match=message):
            nvfp4.quantize(torch.zeros(4, 2, 32), global_scale=torch.ones(shape))


def test_w4a4_operand_bytes_decode_to_dequantize() -> None:
    """What the tensor core is given: packed codes, swizzled scales, globals. Decoded byte by byte in float64."""
    x = torch.randn(150, 112) * torch.logspace(-2, 2, 150).unsqueeze(1)
    packed, scale, global_scale = nvfp4.quantize(x, per_row=True)
    flat = swizzle_32_4_4(scale).view(torch.uint8).numpy()
    rows, columns = np.arange(150)[:, None], np.arange(112)[None]
    j = columns // 16
    offset = ((rows // 128) * 2 + j // 4) * 512 + (rows % 32) * 16 + ((rows % 128) // 32) * 4 + j % 4
    codes = (packed.numpy()[rows, columns // 2] >> (4 * (columns % 2))) & 15
    values = np.where(codes & 8, -1.0, 1.0) * E2M1[codes & 7] * E4M3[flat[offset]]
    values *= global_scale.double().numpy()[:, None]
    assert np.array_equal(nvfp4.dequantize(packed, scale, global_scale, torch.float64).numpy(), values)
