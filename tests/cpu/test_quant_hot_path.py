"""The quantisers that run inside a decode step: no host synchronisation, few operations, inference mode."""

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4.quant import formats, fp8, nvfp4
from dsv4.quant.hadamard import hadamard
from dsv4.quant.layouts import swizzle_32_4_4

Op = Callable[[torch.Tensor], object]

# Name -> (op, the most kernels it may launch). Views are free and not counted.
HOT: dict[str, tuple[Op, int]] = {
    "act_quant": (lambda x: fp8.act_quant(x, 128), 9),
    "act_fake_quant": (lambda x: fp8.act_fake_quant(x, 64), 16),
    "fp4_act_fake_quant": (fp8.fp4_act_fake_quant, 16),
    "nvfp4": (lambda x: nvfp4.quantize(x, per_row=True), 28),
    "e2m1_encode": (formats.e2m1_encode, 13),
    "hadamard": (hadamard, 7 * 3 + 5),
}
VIEWS = (
    "view",
    "slice",
    "select",
    "unbind",
    "_unsafe_view",
    "unsqueeze",
    "squeeze",
    "t",
    "transpose",
    "alias",
    "detach",
)
hot = pytest.mark.parametrize("name", HOT)


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.seen.append(name)
        if name.startswith("div"):
            assert isinstance(args[1], torch.Tensor), "CUDA multiplies by the reciprocal of a Python number instead"
        return func(*args, **(kwargs or {}))


@hot
def test_number_of_kernels(name: str) -> None:
    op, limit = HOT[name]
    x = torch.randn(2, 4, 128).to(torch.bfloat16)
    op(x)  # the first call may fill a table
    with Count() as count:
        op(x)
    assert 3 < len(count.seen) <= limit, count.seen


@hot
def test_does_not_look_at_values(name: str) -> None:
    """A meta tensor has no values: a synchronising op, Python branch or table on another device would fail here."""
    op = HOT[name][0]
    x = torch.randn(3, 128).to(torch.bfloat16)
    real, meta = op(x), op(x.to("meta"))
    for a, b in zip(flat(real), flat(meta), strict=True):
        assert (a.shape, a.dtype, b.device.type) == (b.shape, b.dtype, "meta")
        assert a.is_contiguous()  # kernels and views downstream rely on it


@hot
def test_inference_mode_changes_nothing(name: str) -> None:
    op = HOT[name][0]
    x = torch.randn(3, 128).to(torch.bfloat16)
    with torch.inference_mode():
        inside = flat(op(x.clone()))
    for a, b in zip(inside, flat(op(x)), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_a_table_first_needed_in_inference_mode_serves_outside_of_it() -> None:
    formats._e2m1_pairs.cache_clear()
    with torch.inference_mode():
        decoded = formats.e2m1_decode(torch.arange(16, dtype=torch.uint8))
    assert decoded.tolist() == list(formats.E2M1_VALUES)
    assert not formats._e2m1_pairs(torch.device("cpu")).is_inference()


def test_swizzle_and_decode_do_not_look_at_values() -> None:
    codes, scale, global_scale = nvfp4.quantize(torch.randn(5, 128, device="meta"), per_row=True)
    assert nvfp4.dequantize(codes, scale, global_scale).shape == (5, 128)
    assert swizzle_32_4_4(scale).shape == (1024,)


def flat(result: object) -> list[torch.Tensor]:
    return list(result) if isinstance(result, tuple) else [result]  # type: ignore[list-item]
