"""The oracle itself against the specification's check values, so that it may be believed."""

from __future__ import annotations

import numpy as np
import torch
from oracle import formats
from oracle.shape import rope_frequencies
from oracle.walkthrough import rms_norm, rope, sinkhorn


def test_sinkhorn_gives_the_published_matrix() -> None:
    logits = np.array([[-0.4, 0.3, -0.1, -0.2], [0, 0.1, -0.4, 0.3], [0.6, 0.1, 0.6, -0.7], [-0.56, 0.9, 1, 0.11]])
    expected = [
        [0.213677, 0.300771, 0.209036, 0.276514],
        [0.271114, 0.209437, 0.131708, 0.387740],
        [0.410266, 0.173937, 0.297332, 0.118464],
        [0.104941, 0.315853, 0.361924, 0.217281],
    ]
    np.testing.assert_allclose(sinkhorn(logits, 20, 1e-6), expected, atol=6e-7)


def test_yarn_frequencies_have_the_published_values() -> None:
    yarn = {"factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}
    f = rope_frequencies(64, 160000, yarn)
    spots = {15: 3.635539e-3, 16: 2.265625e-3, 20: 2.969778e-4, 24: 1.953125e-5, 31: 5.680529e-7}
    for i, value in spots.items():
        assert abs(f[i] / value - 1) < 3e-7, i
    np.testing.assert_allclose(f[:16], rope_frequencies(64, 160000, None)[:16], rtol=1e-7)
    np.testing.assert_allclose(f[25:] * 16, rope_frequencies(64, 160000, None)[25:], rtol=1e-7)


def test_frequencies_are_the_float32_numbers_torch_gives() -> None:
    """One last bit in f_i turns position 300 by 3e-5 rad, so the power must round as everybody's does."""
    for dim, base in [(64, 10000), (64, 160000), (16, 10000), (32, 160000), (8, 500.0)]:
        expected = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        np.testing.assert_array_equal(rope_frequencies(dim, base, None), expected.numpy())


def test_rope_turns_adjacent_pairs_of_the_last_dims() -> None:
    x = np.arange(1.0, 7.0)[None].repeat(2, 0)  # [2, 6], four rope dims
    y = rope(x, np.array([0, 3]), np.array([1.0, 0.5], dtype=np.float32))
    np.testing.assert_array_equal(y[0], x[0])
    np.testing.assert_array_equal(y[1, :2], x[1, :2])
    turned = (x[1, 2] + 1j * x[1, 3]) * np.exp(3j), (x[1, 4] + 1j * x[1, 5]) * np.exp(1.5j)
    np.testing.assert_allclose(y[1, 2:], [turned[0].real, turned[0].imag, turned[1].real, turned[1].imag], rtol=1e-15)
    back = rope(y, np.array([0, 3]), np.array([1.0, 0.5], dtype=np.float32), sign=-1)
    np.testing.assert_allclose(back, x, rtol=1e-14)


def test_act_quant_gives_the_published_values() -> None:
    x = np.zeros(128)
    x[:4] = 0.011, -1.7, 3.3, 250.0
    assert formats.act_scale(x, 128) == 1.0
    np.testing.assert_array_equal(formats.act_quant(x, 128)[:4], [0.01171875, -1.75, 3.25, 256.0])


def test_scales_round_up_to_a_power_of_two() -> None:
    rows = np.array([[448.0, 0], [448.0 * 1.0001, 0], [449.0 / 2, 0], [0.0, 0]]).repeat(32, -1)
    # a floor of 1e-4 keeps a group of zeros finite: 2^ceil(log2(1e-4 / 448))
    np.testing.assert_array_equal(formats.act_scale(rows, 64)[:, 0], [1, 2, 1, 2.0**-22])
    np.testing.assert_array_equal(formats.fp4_scale(rows * 6 / 448, 64)[:3, 0], [1, 2, 1])


def test_ties_go_to_the_even_code_and_large_values_saturate() -> None:
    middles = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 1e9])
    np.testing.assert_array_equal(formats.decode_e2m1(formats.encode_e2m1(middles)), [0, 1, 1, 2, 2, 4, 4, 6])
    np.testing.assert_array_equal(formats.decode_e2m1(formats.encode_e2m1(-middles)), [0, -1, -1, -2, -2, -4, -4, -6])
    bytes_ = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(formats.E4M3_VALUES, bytes_.view(torch.float8_e4m3fn).double().numpy())
    x = np.random.default_rng(0).standard_normal(20000) * 100
    x = np.concatenate([x, formats.E4M3_MAGNITUDES, (formats.E4M3_MAGNITUDES[1:] + formats.E4M3_MAGNITUDES[:-1]) / 2])
    expected = torch.from_numpy(x).float().clamp(-448, 448).to(torch.float8_e4m3fn).double().numpy()
    np.testing.assert_array_equal(formats.decode_e4m3(formats.encode_e4m3(x.astype(np.float32))), expected)


def test_nibbles_are_low_first_and_e8m0_is_a_power_of_two() -> None:
    codes = np.arange(16, dtype=np.uint8)
    assert formats.pack_nibbles(codes)[0] == 0x10
    np.testing.assert_array_equal(formats.unpack_nibbles(formats.pack_nibbles(codes)), codes)
    np.testing.assert_array_equal(formats.decode_e8m0(np.array([0, 127, 130], np.uint8)), [2.0**-127, 1, 8])


def test_hadamard_is_natural_order_and_its_own_inverse() -> None:
    h = formats.hadamard(128)
    np.testing.assert_allclose(h @ h, np.eye(128), atol=1e-12)
    signs = np.array([[(-1) ** bin(i & j).count("1") for j in range(128)] for i in range(128)])
    np.testing.assert_array_equal(np.sign(h), signs)


def test_rms_norm_of_a_constant() -> None:
    np.testing.assert_allclose(rms_norm(np.full((1, 4), 3.0), 2.0, 7.0), 2 * 3 / 4)
