"""MXFP4 against a search over the code table, and its exact cast to NVFP4."""

import numpy as np
import pytest
import torch
from test_quant_truth import E2M1, ceil_pow2, nearest

from dsv4.errors import KernelError
from dsv4.quant import mxfp4, nvfp4
from dsv4.quant.formats import pack_nibbles


def random_codes(*shape: int) -> torch.Tensor:
    """Packed codes [..., K/2] of random codes, every one of the 16 present, no group all zero."""
    codes = torch.randint(0, 16, shape, dtype=torch.uint8)
    codes[..., ::32] = 1  # the code hardest to keep when halved
    codes[..., 1:17] = torch.arange(16, dtype=torch.uint8)
    return pack_nibbles(codes)


def exponents(*values: int) -> torch.Tensor:
    """E8M0 bytes [1, C] of these exponents."""
    return torch.tensor([values], dtype=torch.int32).add(127).to(torch.uint8)


def values(codes: torch.Tensor, e8m0: torch.Tensor) -> torch.Tensor:
    """float64, without the code under test: nibbles, table, 2^(byte - 127)."""
    nibbles = np.stack([codes.numpy() & 15, codes.numpy() >> 4], -1).reshape(*codes.shape[:-1], -1)
    signed = np.where(nibbles & 8, -1.0, 1.0) * E2M1[nibbles & 7]
    return torch.from_numpy(signed * np.repeat(2.0 ** (e8m0.double().numpy() - 127), 32, axis=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_equals_the_search(dtype: torch.dtype) -> None:
    x = torch.randn(2, 9, 96) * torch.logspace(-30, 30, 9).unsqueeze(1)
    x[0, 3, 32:64] = 0
    x[1, 4, ::5] = -0.0
    x[1, 5] = torch.randint(-24, 25, (96,)) / 4  # ties
    x = x.to(dtype)
    codes, e8m0 = mxfp4.quantize(x)
    groups = x.double().numpy().reshape(2, 9, 3, 32)
    scale = np.vectorize(ceil_pow2)(np.maximum(np.abs(groups).max(-1), 6 * 2.0**-126) / 6)
    assert np.array_equal(2.0 ** (e8m0.double().numpy() - 127), scale)
    expected = nearest(groups / scale[..., None], E2M1) * scale[..., None]
    assert np.array_equal(values(codes, e8m0).numpy(), expected.reshape(x.shape))
    for out in (torch.float32, torch.float64, torch.bfloat16):
        assert torch.equal(mxfp4.dequantize(codes, e8m0, out).double(), values(codes, e8m0))


def test_zero_group_has_scale_byte_1_and_decodes_to_signed_zeros() -> None:
    x = torch.tensor([0.0, -0.0] * 16)
    codes, e8m0 = mxfp4.quantize(x)
    assert (codes.tolist(), e8m0.tolist()) == ([0x80] * 16, [1])
    assert torch.equal(torch.signbit(mxfp4.dequantize(codes, e8m0)), torch.signbit(x))


def test_non_finite_and_ragged_input_is_refused_by_name() -> None:
    x = torch.zeros(2, 32)
    x[0, 1] = torch.inf
    with pytest.raises(KernelError, match=r"layers\.0\.w2: 1 of 64"):
        mxfp4.quantize(x, name="layers.0.w2")
    with pytest.raises(KernelError, match="last dimension 48; expected a multiple of 32"):
        mxfp4.quantize(torch.zeros(2, 48))


def test_every_e8m0_byte_decodes() -> None:
    e8m0 = torch.arange(255, dtype=torch.uint8).unsqueeze(0)
    codes = random_codes(1, 255 * 32)
    low = values(codes, e8m0)
    assert torch.equal(mxfp4.dequantize(codes, e8m0, torch.float64), low.float().double())
    assert mxfp4.dequantize(codes[:, :16], torch.tensor([[255]], dtype=torch.uint8)).isnan().all()


@pytest.mark.parametrize("span", range(18))
@pytest.mark.parametrize("k_max", [-7, 100, -100])
def test_cast_is_exact_up_to_span_17(span: int, k_max: int) -> None:
    codes, e8m0 = random_codes(1, 96), exponents(k_max, k_max - span, k_max - span // 2)
    new_codes, scale, global_scale, exact = nvfp4.from_mxfp4(codes, e8m0)
    assert exact
    assert torch.equal(new_codes, codes)  # bit for bit, minus zeros included
    assert global_scale == 2.0 ** (k_max - 8)
    assert torch.equal(scale.double()[0, ::2], 2.0 ** (e8m0[0].double() - 127 - k_max + 8))
    assert torch.equal(scale.double()[0, ::2], scale.double()[0, 1::2])
    assert torch.equal(nvfp4.dequantize(new_codes, scale, global_scale, torch.float64), values(codes, e8m0))
    assert torch.equal(nvfp4.dequantize(new_codes, scale, global_scale), mxfp4.dequantize(codes, e8m0))


@pytest.mark.parametrize("span", [18, 19, 21, 40, 250])
def test_cast_is_not_exact_from_span_18_and_rounds_to_the_nearest(span: int) -> None:
    codes, e8m0 = random_codes(1, 64), exponents(123, 123 - span)
    new_codes, scale, global_scale, exact = nvfp4.from_mxfp4(codes, e8m0)
    assert not exact
    decoded = nvfp4.dequantize(new_codes, scale, global_scale, torch.float64)
    old = values(codes, e8m0)
    assert torch.equal(decoded[:, :32], old[:, :32])
    step = 2.0 ** (-9 + 123 - 8)
    assert np.array_equal(decoded[:, 32:].numpy(), nearest(old[:, 32:].numpy() / step, E2M1) * step)


def test_exact_speaks_of_values_so_codes_that_halve_stay_exact_beyond_span_17() -> None:
    codes = torch.full((1, 32), 0x42, dtype=torch.uint8)  # values 1 and 2: halves are codes too
    new_codes, scale, global_scale, exact = nvfp4.from_mxfp4(codes, exponents(0, -18))
    assert exact
    old = values(codes, exponents(0, -18))
    assert torch.equal(nvfp4.dequantize(new_codes, scale, global_scale, torch.float64), old)


def test_zero_groups_do_not_count_for_the_span() -> None:
    codes = random_codes(1, 128)
    codes[:, 16:32] = 0x80  # a group of zeros of both signs
    codes[:, 48:] = 0
    e8m0 = exponents(0, 90, -17, -90)
    assert [int(k) for k in nvfp4.mxfp4_exponents(codes, e8m0)] == [-17, 0]
    new_codes, scale, global_scale, exact = nvfp4.from_mxfp4(codes, e8m0)
    assert exact
    assert torch.equal(new_codes, codes)
    decoded = nvfp4.dequantize(new_codes, scale, global_scale, torch.float64)
    assert torch.equal(decoded, values(codes, e8m0))


def test_zero_tensor_has_global_1() -> None:
    codes, e8m0 = torch.full((2, 1, 16), 0x08, dtype=torch.uint8), torch.zeros(2, 1, 1, dtype=torch.uint8)
    assert [k.tolist() for k in nvfp4.mxfp4_exponents(codes, e8m0)] == [[8, 8], [8, 8]]
    new_codes, scale, global_scale, exact = nvfp4.from_mxfp4(codes, e8m0)
    assert (global_scale.tolist(), exact) == ([1, 1], True)
    assert not nvfp4.dequantize(new_codes, scale, global_scale).any()


def test_a_joint_k_max_shares_one_global() -> None:
    w1, w3 = (random_codes(1, 64), exponents(-3, -5)), (random_codes(1, 64), exponents(-9, -20))
    k_max = torch.maximum(nvfp4.mxfp4_exponents(*w1)[1], nvfp4.mxfp4_exponents(*w3)[1])
    cast = [nvfp4.from_mxfp4(*w, k_max) for w in (w1, w3)]
    assert [c[2].item() for c in cast] == [2.0**-11] * 2
    for w, (*parts, exact) in zip((w1, w3), cast, strict=True):
        assert exact
        assert torch.equal(nvfp4.dequantize(*parts, torch.float64), values(*w))
    assert nvfp4.from_mxfp4(*w3, -3)[2] == 2.0**-11  # an int serves too
    assert not nvfp4.from_mxfp4(*w3, -2)[3]  # span -2 .. -20 is 18
    with pytest.raises(KernelError, match=r"k_max \[-4\] is below the largest scale exponent \[-3\]"):
        nvfp4.from_mxfp4(*w1, -4)


def test_a_stack_has_one_global_each_and_tells_which_spans_too_much() -> None:
    codes = random_codes(3, 1, 64)
    e8m0 = torch.stack([exponents(0, -1), exponents(40, 20), exponents(-60, -77)])
    new_codes, scale, global_scale, exact = nvfp4.from_mxfp4(codes, e8m0)
    assert global_scale.tolist() == [2.0**-8, 2.0**32, 2.0**-68]
    k_min, k_max = nvfp4.mxfp4_exponents(codes, e8m0)
    assert (k_max - k_min).tolist() == [1, 20, 17]
    assert not exact
    old, new = values(codes, e8m0), nvfp4.dequantize(new_codes, scale, global_scale, torch.float64)
    assert [torch.equal(old[e], new[e]) for e in range(3)] == [True, False, True]
    assert torch.equal(new_codes[[0, 2]], codes[[0, 2]])


def test_an_e8m0_nan_is_refused() -> None:
    with pytest.raises(KernelError, match="byte 255"):
        nvfp4.from_mxfp4(random_codes(1, 32), torch.tensor([[255]], dtype=torch.uint8))


def test_requantising_instead_of_casting_would_move_codes() -> None:
    """Why the cast exists: the default recipe (decode, quantise again) changes most values."""
    x = torch.randn(64, 256)
    codes, e8m0 = mxfp4.quantize(x)
    old = mxfp4.dequantize(codes, e8m0)
    again = nvfp4.dequantize(*nvfp4.quantize(old))
    assert (again != old).float().mean() > 0.4
