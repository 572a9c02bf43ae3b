"""Weights as stored: shapes, bytes, exact values, slices and stacks of every format, and what they refuse."""

from collections.abc import Callable

import pytest
import torch

from dsv4.errors import CheckpointError, KernelError
from dsv4.quant import fp8, mxfp4, nvfp4
from dsv4.quant.weights import FP8Weight, MXFP4Weight, NVFP4Weight, PlainWeight, Weight, stack

SHAPE = (3, 256, 384)
NUMEL = 3 * 256 * 384


def nvfp4_weight(x: torch.Tensor) -> NVFP4Weight:
    codes, scale, global_scale = nvfp4.quantize(x)
    return NVFP4Weight(codes, scale, global_scale, torch.full_like(global_scale, 0.5))


BUILD: dict[str, Callable[[torch.Tensor], Weight]] = {
    "nvfp4": nvfp4_weight,
    "mxfp4": MXFP4Weight.quantize,
    "fp8": FP8Weight.quantize,
    "fp8_f32": lambda x: FP8Weight(x.to(torch.float8_e4m3fn), torch.rand(*x.shape[:-2], 2, 3) + 0.5),
    "bf16": lambda x: PlainWeight(x.to(torch.bfloat16)),
    "f32": PlainWeight,
}
BYTES = {
    "nvfp4": NUMEL // 2 + NUMEL // 16 + 3 * 4 + 3 * 4,
    "mxfp4": NUMEL // 2 + NUMEL // 32,
    "fp8": NUMEL + 3 * 2 * 3,
    "fp8_f32": NUMEL + 3 * 2 * 3 * 4,
    "bf16": NUMEL * 2,
    "f32": NUMEL * 4,
}
every_format = pytest.mark.parametrize("kind", BUILD)


def build(kind: str) -> Weight:
    return BUILD[kind](torch.randn(SHAPE) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None])


@every_format
def test_shape_bytes_and_format(kind: str) -> None:
    weight = build(kind)
    assert weight.shape == SHAPE
    assert weight.nbytes == BYTES[kind]
    assert weight.format == kind.split("_")[0]
    assert weight.device == torch.device("cpu")
    assert str(BYTES[kind]) in repr(weight)
    weight.check_finite("w")


@every_format
def test_float32_is_the_exact_value_rounded_once(kind: str) -> None:
    weight = build(kind)
    dense = weight.dequantize()
    assert (dense.dtype, dense.shape) == (torch.float32, SHAPE)
    assert weight.nbytes == BYTES[kind]
    exact = weight.dequantize(torch.float64)
    assert torch.equal(dense, exact.float())
    if kind in ("mxfp4", "fp8", "bf16"):  # all factors are powers of two
        assert torch.equal(dense.double(), exact)
        assert torch.equal(weight.dequantize(torch.bfloat16).double(), exact)


@every_format
def test_select_and_stack_are_inverse(kind: str) -> None:
    weight = build(kind)
    experts = [weight.select(e) for e in range(3)]
    assert all(expert.shape == SHAPE[1:] for expert in experts)
    for e, expert in enumerate(experts):
        assert torch.equal(expert.dequantize(), weight.dequantize()[e])
    again = stack(experts)
    assert (type(again), again.shape, again.nbytes) == (type(weight), SHAPE, BYTES[kind])
    assert torch.equal(again.dequantize(), weight.dequantize())
    with pytest.raises(KernelError, match="cannot select entry 0"):
        experts[0].select(0)


def test_select_is_a_view() -> None:
    weight = build("mxfp4")
    assert weight.select(1).tensors()["codes"].data_ptr() == weight.tensors()["codes"][1].data_ptr()


@every_format
def test_rows_and_columns_are_slices_of_the_values(kind: str) -> None:
    weight = build(kind)
    whole = weight.dequantize()
    assert torch.equal(weight.rows(128, 256).dequantize(), whole[:, 128:256])
    assert torch.equal(weight.columns(128, 384).dequantize(), whole[..., 128:384])
    assert torch.equal(weight.select(2).rows(0, 128).columns(256, 384).dequantize(), whole[2, :128, 256:])
    assert weight.rows(0, 0).shape == (3, 0, 384)


@pytest.mark.parametrize(
    ("kind", "step", "part"), [("nvfp4", 16, "scale"), ("mxfp4", 32, "scale"), ("fp8", 128, "scale")]
)
def test_a_cut_through_a_scale_group_is_refused(kind: str, step: int, part: str) -> None:
    weight = build(kind)
    assert weight.columns(step, 2 * step).shape == (3, 256, step)
    for start, stop in ((step // 2, 2 * step), (0, step + step // 2)):
        with pytest.raises(KernelError, match=f"its {part} covers {step} entries .* use multiples of {step}"):
            weight.columns(start, stop)
    with pytest.raises(KernelError, match=r"cannot take 0\.\.385"):
        weight.columns(0, 385)


def test_only_fp8_restricts_rows_and_its_last_block_may_be_short() -> None:
    assert build("nvfp4").rows(3, 7).shape == (3, 4, 384)
    with pytest.raises(KernelError, match="use multiples of 128"):
        build("fp8").rows(0, 64)
    ragged = FP8Weight.quantize(torch.randn(200, 130))
    assert torch.equal(ragged.rows(128, 200).dequantize(), ragged.dequantize()[128:])
    assert torch.equal(ragged.columns(128, 130).dequantize(), ragged.dequantize()[:, 128:])


@every_format
def test_to_the_same_device_is_the_weight_itself_and_another_device_moves_every_tensor(kind: str) -> None:
    weight = build(kind)
    assert weight.to("cpu") is weight
    moved = weight.to("meta")
    assert (moved.device.type, moved.shape, moved.nbytes) == ("meta", SHAPE, BYTES[kind])
    assert all(tensor.device.type == "meta" for tensor in moved.tensors().values())


def test_nvfp4_from_mxfp4_keeps_every_value() -> None:
    weight = build("mxfp4")
    assert isinstance(weight, MXFP4Weight)
    cast, exact = NVFP4Weight.from_mxfp4(weight)
    assert exact
    assert torch.equal(cast.dequantize(), weight.dequantize())
    k_max = nvfp4.mxfp4_exponents(weight.codes, weight.scale)[1]
    joint, exact = NVFP4Weight.from_mxfp4(weight, k_max + 2)
    assert exact
    assert torch.equal(joint.global_scale, cast.global_scale * 4)
    assert torch.equal(joint.dequantize(), weight.dequantize())


def test_quantize_constructors_equal_the_functions() -> None:
    x = torch.randn(2, 32, 64)
    assert torch.equal(NVFP4Weight.quantize(x).dequantize(), nvfp4.dequantize(*nvfp4.quantize(x)))
    assert torch.equal(MXFP4Weight.quantize(x).dequantize(), mxfp4.dequantize(*mxfp4.quantize(x)))
    assert torch.equal(FP8Weight.quantize(x).dequantize(), fp8.dequantize_block(*fp8.quantize_block(x)))


@pytest.mark.parametrize("cls", [NVFP4Weight, MXFP4Weight, FP8Weight])
def test_quantising_non_finite_values_is_refused_by_name(cls: type[NVFP4Weight]) -> None:
    x = torch.zeros(32, 64)
    x[1, 2] = torch.nan
    with pytest.raises(KernelError, match=r"layers\.3\.attn\.wq_a: 1 of 2048 values are NaN or Inf"):
        cls.quantize(x, name="layers.3.attn.wq_a")


@pytest.mark.parametrize(
    ("kind", "tensor", "byte"),
    [("nvfp4", "scale", 0x7F), ("mxfp4", "scale", 0xFF), ("fp8", "scale", 0xFF), ("fp8", "data", 0xFF)],
)
def test_a_stored_nan_is_refused_by_name(kind: str, tensor: str, byte: int) -> None:
    weight = build(kind)
    weight.tensors()[tensor].view(torch.uint8)[1, 1, 2] = byte
    with pytest.raises(CheckpointError, match=rf"layers\.0\.w\.{tensor}: 1 of .* at index \(1, 1, 2\)"):
        weight.check_finite("layers.0.w")


@pytest.mark.parametrize(("kind", "tensor"), [("nvfp4", "global_scale"), ("nvfp4", "input_scale"), ("bf16", "data")])
def test_a_stored_infinity_is_refused_by_name(kind: str, tensor: str) -> None:
    weight = build(kind)
    weight.tensors()[tensor].flatten()[1] = torch.inf
    with pytest.raises(CheckpointError, match=f"w.{tensor}: 1 of"):
        weight.check_finite("w")


def test_byte_containers_of_other_dtypes_are_read_as_bytes() -> None:
    """Checkpoints hold packed codes as int8 and E8M0 scales as float8_e8m0fnu."""
    weight = build("mxfp4")
    assert isinstance(weight, MXFP4Weight)
    same = MXFP4Weight(weight.codes.view(torch.int8), weight.scale.view(torch.float8_e8m0fnu))
    assert torch.equal(same.dequantize(), weight.dequantize())
    assert {t.dtype for t in same.tensors().values()} == {torch.uint8}


def test_a_scalar_global_may_have_shape_1() -> None:
    codes, scale, global_scale = nvfp4.quantize(torch.randn(4, 32))
    weight = NVFP4Weight(codes, scale, global_scale.reshape(1), torch.ones(1))
    assert weight.global_scale.shape == ()
    assert torch.equal(weight.dequantize(), nvfp4.dequantize(codes, scale, global_scale))
    assert "input_scale" not in NVFP4Weight(codes, scale, global_scale).tensors()


def u8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def e4m3(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float8_e4m3fn)


def refuse(build_it: Callable[[], object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        build_it()


def test_nvfp4_tensors_that_do_not_fit_are_refused() -> None:
    one = torch.ones(())
    refuse(lambda: NVFP4Weight(u8(4, 16), e4m3(4, 1), one), r"NVFP4 scale is .* \(4, 1\); expected .* \(4, 2\)")
    refuse(lambda: NVFP4Weight(u8(4, 16), u8(4, 2), one), r"NVFP4 scale is torch\.uint8")
    refuse(lambda: NVFP4Weight(u8(2, 4, 16), e4m3(2, 4, 2), one), r"global_scale is .* \(\); expected .* \(2,\)")
    refuse(lambda: NVFP4Weight(u8(4, 16), e4m3(4, 2), one.double()), r"global_scale is torch\.float64")
    refuse(lambda: NVFP4Weight(u8(4, 16), e4m3(4, 2), one, torch.ones(4)), r"input_scale is .* \(4,\)")
    refuse(lambda: NVFP4Weight(u8(4, 4), e4m3(4, 0), one), "has 8 columns; expected a multiple of 16")
    refuse(lambda: NVFP4Weight(torch.zeros(4, 16), e4m3(4, 2), one), r"codes is torch\.float32; expected one-byte")


def test_other_tensors_that_do_not_fit_are_refused() -> None:
    refuse(lambda: MXFP4Weight(u8(4, 16), u8(4, 2)), r"MXFP4 scale is .* \(4, 2\); expected .* \(4, 1\)")
    refuse(lambda: MXFP4Weight(u8(4, 8), u8(4, 1)), "has 16 columns; expected a multiple of 32")
    refuse(lambda: FP8Weight(u8(4, 16), u8(1, 1)), r"FP8 data is torch\.uint8")
    refuse(lambda: FP8Weight(e4m3(129, 16), u8(1, 1)), r"FP8 scale is .* \(1, 1\); expected .* \(2, 1\)")
    refuse(lambda: PlainWeight(torch.zeros(2, 2, dtype=torch.float16)), r"plain weight is torch\.float16")


def test_only_equal_weights_stack() -> None:
    plain = [PlainWeight(torch.zeros(2, n)) for n in (2, 3)]
    refuse(lambda: stack([]), "cannot stack")
    refuse(lambda: stack(plain), r"cannot stack \['f32 \(2, 2\)', 'f32 \(2, 3\)'\]")
    refuse(lambda: stack([plain[0], PlainWeight(torch.zeros(2, 2).bfloat16())]), "bf16")
    codes, scale, global_scale = nvfp4.quantize(torch.randn(2, 16))
    refuse(lambda: stack([NVFP4Weight(codes, scale, global_scale), nvfp4_weight(torch.randn(2, 16))]), "tensor set")
