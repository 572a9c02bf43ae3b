"""E2M1, E4M3 and E8M0 against code tables built from the bit fields, at every code, tie, neighbour and limit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_quant_truth import E2M1, E4M3, around, ceil_pow2, midpoints, nearest, nearest_code

from dsv4.errors import CheckpointError, KernelError
from dsv4.quant import formats

FINITE_F32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def hard_cases(table: np.ndarray) -> np.ndarray:
    """Every value and midpoint with float32 neighbours, subnormals, limits, a dense sweep; both signs."""
    extremes = np.array([0, 1e-45, 1.17e-38, 1e-30, 464, 1e9, 3.4e38], dtype=np.float32)
    sweep = np.linspace(0, 1.2 * table[-1], 5001, dtype=np.float32)
    positive = np.abs(np.concatenate([around(table), around(midpoints(table)), extremes, sweep]))
    return np.concatenate([positive, -positive])


def signed_codes(x: np.ndarray) -> np.ndarray:
    return nearest_code(np.abs(x), E2M1) + 8 * np.signbit(x)


def test_e2m1_decodes_all_16_codes() -> None:
    decoded = formats.e2m1_decode(torch.arange(16, dtype=torch.uint8)).numpy()
    assert decoded.tolist() == [*E2M1, *-E2M1] == list(formats.E2M1_VALUES)
    assert np.signbit(decoded[8])


@pytest.mark.parametrize("shape", [(4, 4), (0,), (0, 4), ()])
def test_e2m1_keeps_shapes(shape: tuple[int, ...]) -> None:
    codes = torch.ones(shape, dtype=torch.uint8)
    assert formats.e2m1_decode(codes).shape == shape
    assert torch.equal(formats.e2m1_encode(formats.e2m1_decode(codes)), codes)


def test_e2m1_round_trips_all_16_codes_minus_zero_included() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(formats.e2m1_encode(formats.e2m1_decode(codes)), codes)


def test_e2m1_rounds_to_nearest_ties_to_even_and_saturates() -> None:
    x = hard_cases(E2M1)
    assert np.array_equal(formats.e2m1_encode(torch.from_numpy(x)).numpy(), signed_codes(x))


def test_e2m1_ties_go_up_only_at_0_75_1_75_3_5() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert formats.e2m1_decode(formats.e2m1_encode(ties)).tolist() == [0, 1, 1, 2, 2, 4, 4]


def test_e2m1_saturates_infinity_and_gives_nan_some_code() -> None:
    codes = formats.e2m1_encode(torch.tensor([torch.inf, -torch.inf, torch.nan, -torch.nan]))
    assert codes[:2].tolist() == [7, 15]
    assert int(codes.max()) <= 15  # packing relies on four bits, whatever the input was


def test_e2m1_encodes_every_bfloat16() -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[torch.isfinite(x)]
    assert np.array_equal(formats.e2m1_encode(x).numpy(), signed_codes(x.float().numpy()))


@given(st.lists(FINITE_F32, min_size=1, max_size=40))
def test_e2m1_is_nearest_for_any_float32(values: list[float]) -> None:
    x = np.array(values, dtype=np.float32)
    assert np.array_equal(formats.e2m1_encode(torch.from_numpy(x)).numpy(), signed_codes(x))


def test_packing_puts_the_even_index_in_the_low_nibble() -> None:
    assert formats.pack_nibbles(torch.tensor([[1, 2, 0xF, 0]], dtype=torch.uint8)).tolist() == [[0x21, 0x0F]]


def test_packing_round_trips_every_byte() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(2, 128)
    codes = formats.unpack_nibbles(packed)
    assert codes.shape == (2, 256)
    assert torch.equal(formats.pack_nibbles(codes), packed)
    assert torch.equal(formats.e2m1_decode_packed(packed), formats.e2m1_decode(codes))


def test_packing_reads_strided_and_offset_views() -> None:
    codes = torch.randint(0, 16, (9, 34), dtype=torch.uint8)
    for view in (codes[:, 1:33], codes.t()[:, 1:], codes[::2, ::2][:, 1:]):
        view = view[:, : view.shape[1] // 2 * 2]
        assert torch.equal(formats.unpack_nibbles(formats.pack_nibbles(view)), view)
    assert formats.pack_nibbles(codes[:0]).shape == (0, 17)


def test_packing_an_odd_number_of_codes_is_refused() -> None:
    with pytest.raises(KernelError, match="cannot pack 3 codes"):
        formats.pack_nibbles(torch.zeros(2, 3, dtype=torch.uint8))


def test_e4m3_decodes_all_256_bytes() -> None:
    decoded = formats.e4m3_decode(torch.arange(256, dtype=torch.uint8)).numpy()
    assert decoded[:127].tolist() == E4M3.tolist()
    assert decoded[128:255].tolist() == (-E4M3).tolist()
    assert np.isnan(decoded[[127, 255]]).all()
    assert np.signbit(decoded[128])


def test_e4m3_rounds_to_nearest_ties_to_even_and_saturates() -> None:
    x = hard_cases(E4M3)
    bytes_ = formats.e4m3_encode(torch.from_numpy(x)).view(torch.uint8).numpy()
    assert np.array_equal(bytes_, nearest_code(np.abs(x), E4M3) + 128 * np.signbit(x))


def test_e4m3_saturates_infinity_and_keeps_nan() -> None:
    encoded = formats.e4m3_encode(torch.tensor([torch.inf, -torch.inf, 464.0, 465.0, torch.nan])).float()
    assert encoded[:4].tolist() == [448, -448, 448, 448]
    assert encoded[4].isnan()


def test_e8m0_decodes_all_256_bytes() -> None:
    decoded = formats.e8m0_decode(torch.arange(256, dtype=torch.uint8)).numpy()
    assert decoded[:255].tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    assert np.isnan(decoded[255])


def test_e8m0_round_trips_every_exponent() -> None:
    exponent = torch.arange(-127, 128)
    byte = formats.e8m0_encode(exponent, check=True)
    assert torch.equal(byte, torch.arange(255, dtype=torch.uint8))
    assert formats.e8m0_decode(byte).tolist() == [2.0**e for e in range(-127, 128)]


def test_e8m0_refuses_or_clamps_an_exponent_out_of_range() -> None:
    assert formats.e8m0_encode(torch.tensor([-128, 128])).tolist() == [0, 254]
    with pytest.raises(KernelError, match=r"from -128 to 3; expected -127\.\.127"):
        formats.e8m0_encode(torch.tensor([-128, 3]), check=True)


@pytest.mark.parametrize(
    ("table", "mantissa_bits", "min_exponent"), [(E2M1, 1, 0), (E4M3, 3, -6)], ids=["e2m1", "e4m3"]
)
def test_round_magnitude_equals_the_table(table: np.ndarray, mantissa_bits: int, min_exponent: int) -> None:
    y = np.abs(hard_cases(table))
    y = y[y <= np.nextafter(np.float32(table[-1]), np.float32(np.inf))]
    rounded = formats.round_magnitude_(torch.tensor(y), mantissa_bits=mantissa_bits, min_exponent=min_exponent)
    assert np.array_equal(rounded.numpy(), nearest(y, table))


def test_pow2_ceil_at_every_power_and_its_neighbours() -> None:
    x = around(2.0 ** np.arange(-125, 126))
    assert formats.pow2_ceil(torch.from_numpy(x)).tolist() == [ceil_pow2(float(v)) for v in x]


def products() -> torch.Tensor:
    """All 8 x 127 = 1016 products of an E2M1 magnitude and a non-negative finite E4M3, float64."""
    return torch.from_numpy(np.outer(E2M1, E4M3).ravel())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_1016_products_are_exact_in_16_bits(dtype: torch.dtype) -> None:
    exact = products()
    assert exact.shape == (1016,)
    assert exact.max() == 2688
    assert exact[exact > 0].min() == 2.0**-10
    assert torch.equal(exact.to(dtype).double(), exact)


def test_products_with_a_power_of_two_global_are_exact_in_bfloat16_but_not_in_float16() -> None:
    for exponent in range(-100, 101, 4):
        scaled = products() * 2.0**exponent
        assert torch.equal(scaled.to(torch.bfloat16).double(), scaled)
    scaled = products() * 2.0**-17
    assert not torch.equal(scaled.to(torch.float16).double(), scaled)


def test_products_with_another_global_are_not_exact_in_bfloat16() -> None:
    scaled = products() * (0.1875 / 2688)
    assert (
        scaled.to(torch.bfloat16).double() == scaled
    ).double().mean() < 0.25  # so the global belongs on the accumulator


def test_check_finite_names_the_tensor_and_the_place() -> None:
    x = torch.zeros(3, 4)
    formats.check_finite(x, "w")
    x[1, 2] = torch.nan
    x[2, 0] = torch.inf
    with pytest.raises(KernelError, match=r"layers\.0\.w1: 2 of 12 values are NaN or Inf, the first at index \(1, 2\)"):
        formats.check_finite(x, "layers.0.w1")
    with pytest.raises(CheckpointError):
        formats.check_finite(x, "w", CheckpointError)
    with pytest.raises(KernelError):
        formats.e2m1_encode(x, check=True)
    with pytest.raises(KernelError):
        formats.e4m3_encode(x, check=True)


def test_other_dtypes_are_refused_by_name() -> None:
    for dtype in (torch.float64, torch.float16, torch.int32):
        with pytest.raises(KernelError, match=f"x is {dtype}"):
            formats.e2m1_encode(torch.zeros(2, dtype=dtype))
