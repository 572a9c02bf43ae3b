"""Cases of linear: projections of Flash and Pro, every format, ragged and odd sizes, extremes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.case import FLASH, PRO, Case, Maker, Tolerances, nbytes, rounding
from dsv4.kernels.linear.linear import linear
from dsv4.kernels.linear.linear_ref import linear_ref
from dsv4.kernels.linear.operand import Projection, linear_operand
from dsv4.kernels.linear.tiled import Tiled
from dsv4.quant.activations import Act, treat
from dsv4.quant.weights import FP8Weight, MXFP4Weight, NVFP4Weight, PlainWeight, Weight

#: Outputs of Flash's and Pro's projections by K: (name, rows of each part, how many of them stay plain and float32).
Shape = tuple[str, tuple[int, ...], int]
CSA_FLASH: Shape = ("in_proj csa", (1024, 512, 1024, 1024, 256, 256, 64), 5)
SHAPES: dict[int, list[Shape]] = {
    FLASH: [
        CSA_FLASH,
        ("in_proj hca", (1024, 512, 512, 512), 2),
        ("shared w1 w3", (2048, 2048), 0),
        ("gate", (256,), 1),
    ],
    1024: [("wq_b", (32768,), 0), ("indexer wq_b", (8192,), 0)],
    8192: [("wo_b", (4096,), 0)],
    2048: [("shared w2", (4096,), 0)],
    PRO: [("Pro in_proj", (1536, 512, 1024, 1024, 256, 256, 64), 5), ("Pro shared w1 w3", (3072, 3072), 0)],
    1536: [("Pro wq_b", (65536,), 0)],
    16384: [("Pro wo_b", (7168,), 0)],
}
ROWS = (1, 2, 3, 8, 9, 16, 17, 31, 32, 33, 64, 65, 128, 192, 193, 300, 4096)


def weight(make: Maker, format: str, n: int, k: int) -> Weight:
    """Values of variance about 1/K."""
    if format == "nvfp4":  # all codes, scales from 0.5 to 1.9
        codes = make.integers(0, 256, n, k // 2).to(torch.uint8)
        scale = make.integers(0x30, 0x40, n, k // 16).to(torch.uint8).view(torch.float8_e4m3fn)
        return NVFP4Weight(codes, scale, torch.tensor(0.3 * k**-0.5, device=make.device))
    values = make.normal(n, k, scale=k**-0.5)
    if format == "mxfp4":
        return MXFP4Weight.quantize(values)
    return FP8Weight.quantize(values) if format == "fp8" else PlainWeight(values.bfloat16())


def extremes(make: Maker, n: int, k: int) -> NVFP4Weight:
    """Every scale from the smallest to the largest, groups and rows of zeros, codes of one value."""
    w = weight(make, "nvfp4", n, k)
    assert isinstance(w, NVFP4Weight)
    scale = (torch.arange(w.scale.numel(), device=make.device) % 127).to(torch.uint8).view(w.scale.shape)
    w.codes[0], w.codes[1], w.codes[n - 1] = 0x77, 0xFF, 0x80
    scale[2], scale[3] = 0x7E, 0
    return NVFP4Weight(w.codes, scale.view(torch.float8_e4m3fn), w.global_scale)


def accumulation(k: int, exact: Tensor, magnitudes: Tensor) -> Tensor:
    """Two float32 sums of K products in different orders (a tensor core truncates), and the rounding of the result."""
    return rounding(exact) + magnitudes.double() * (4 * k**0.5 + 16) * 2.0**-24 + 1e-30


def values(weight: Weight | Tiled) -> Tensor:
    return weight.values() * weight.alpha if isinstance(weight, Tiled) else weight.dequantize()


def tolerance(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    x, operand = args
    bounds: list[Tensor | None] = [None] * len(expected)
    for part in operand.joined:
        seen = treat(x, part.treatment).abs()
        for place in part.places:
            magnitudes = torch.nn.functional.linear(seen, values(operand.projections[place].weight).abs())
            bounds[place] = accumulation(x.shape[-1], expected[place], magnitudes)
    return bounds


def activations(make: Maker, rows: int, k: int) -> Tensor:
    """Normal values, an outlier column, a tiny and a large row."""
    x = make.normal(rows, k)
    x[:, k // 3] *= 40
    x[rows // 2 :: 5] *= 2.0**-30
    x[rows // 3 :: 7] *= 2.0**20
    return x.bfloat16()


def joined(
    make: Maker, name: str, rows: int, k: int, parts: tuple[int, ...], plain: int, formats: tuple[str, str], act: Act
) -> Case:
    """`plain` parts at the end keep a plain input and a float32 output, in the second format."""
    quantised = [Projection(weight(make, formats[0], n, k)) for n in parts[: len(parts) - plain]]
    others = [Projection(weight(make, formats[1], n, k), plain=True, f32=True) for n in parts[len(parts) - plain :]]
    operand = linear_operand(*quantised, *others, act=act)
    x = activations(make, rows, k)
    moved = operand.nbytes + nbytes(x) + rows * (sum(parts[: len(quantised)]) * 2 + sum(parts[len(quantised) :]) * 4)
    label = f"{name} {'+'.join(dict.fromkeys(formats))} act={act} [{rows}, {k}] -> {'+'.join(map(str, parts))}"
    return Case("linear", label, "bf16", linear, linear_ref, (x, operand), tolerance, moved=moved)


def small(make: Maker) -> Iterator[Case]:
    """Every path in sizes that a sanitizer bears."""
    four, plain = ("nvfp4", "nvfp4"), ("bf16", "bf16")
    for rows in (1, 3, 8, 9, 17, 33, 64, 65, 130, 200):
        yield joined(make, "small", rows, 1088, (40, 24), 1, four, "bf16")
        yield joined(make, "small", rows, 272, (72, 16, 8), 2, ("fp8", "bf16"), "fp8")
    for n, k in ((1, 16), (17, 48), (128, 256), (1000, 64), (300, 2064)):
        for formats in (four, ("fp8", "fp8"), plain, ("mxfp4", "mxfp4")):
            if formats[0] != "mxfp4" or k % 32 == 0:
                yield joined(make, "odd", 5, k, (n,), 0, formats, "bf16")
    for rows in (2, 9, 40):
        yield joined(make, "tall", rows, 592, (30000,), 0, four, "bf16")
    acts: tuple[Act, ...] = ("fp8", "nvfp4")
    for act in acts:
        yield joined(make, "treated", 7, 256, (64, 48), 1, four, act)
        yield joined(make, "treated", 7, 256, (64, 48), 1, ("fp8", "bf16"), act)
    x, wide = activations(make, 9, 512), activations(make, 9, 600)
    for part in (x, wide[:, 3:515], wide[:, 8:520], torch.zeros_like(x), x[:0], x[:1]):
        operand = linear_operand(extremes(make, 80, 512), act="bf16")
        name = f"extreme scales {list(part.shape)} stride {part.stride(0)}"
        yield Case("linear", name, "bf16", linear, linear_ref, (part, operand), tolerance)
    for value in (float("nan"), float("inf")):
        bad = activations(make, 4, 1024)
        bad[1, 700] = value
        operand = linear_operand(NVFP4Weight.quantize(make.normal(48, 1024).abs() + 0.1), act="bf16")
        yield Case("linear", f"a row with {value}", "bf16", linear, linear_ref, (bad, operand), tolerance)


def large(make: Maker) -> Iterator[Case]:
    four, native = ("nvfp4", "nvfp4"), ("fp8", "bf16")
    for rows in ROWS:
        yield joined(make, CSA_FLASH[0], rows, FLASH, *CSA_FLASH[1:], four, "bf16")
    for k, shapes in SHAPES.items():
        for name, parts, plain in shapes:
            for rows in (1, 8, 16, 64):
                yield joined(make, name, rows, k, parts, plain, native if name == "gate" else four, "bf16")
            yield joined(make, name, 1, k, parts, plain, native, "fp8")
    for rows in (8, 16, 17, 64, 192):  # blocks of one and of two passes of 16 tiles, and rings of many slices
        yield joined(make, "wide", rows, FLASH, (32768,), 0, four, "bf16")
        yield joined(make, "ragged", rows, FLASH + 16, (37001,), 0, four, "bf16")
        yield joined(make, "ragged", rows, 1024 + 48, (3001, 999), 1, four, "bf16")
    for rows in (1, 8, 32, 64, 300):
        yield joined(make, "wq_b", rows, 1024, (32768,), 0, ("fp8", "fp8"), "bf16")
        yield joined(make, "w1 w3 gate", rows, FLASH, (2048, 2048, 256), 1, ("nvfp4", "bf16"), "bf16")
    for rows in (1, 8, 64):
        yield joined(make, "w4a4 wo_b", rows, 8192, (4096,), 0, four, "nvfp4")
        yield joined(make, "head", rows, FLASH, (129280,), 1, four, "bf16")
    yield joined(make, "w4a4 wo_b", 300, 8192, (4096,), 0, four, "nvfp4")
    yield joined(make, "head", 1, FLASH, (129280,), 1, ("bf16", "bf16"), "bf16")
    yield joined(make, "Pro head", 1, PRO, (129280,), 1, four, "bf16")
    for rows in (128, 300, 4096):
        yield joined(make, "wq_b", rows, 1024, (32768,), 0, four, "bf16")
    yield joined(make, "wo_b", 4096, 8192, (4096,), 0, four, "bf16")


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    yield from small(make)
    if not quick:
        yield from large(make)
