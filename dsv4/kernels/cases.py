"""The cases in which every kernel meets its twin on a GPU: shapes of V4, ragged and empty ones, and what may differ.

A tolerance is a tensor per output; none means that bits are the contract.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.mhc_head.mhc_head import mhc_head
from dsv4.kernels.mhc_head.mhc_head_ref import mhc_head_ref
from dsv4.kernels.mhc_post.mhc_post import mhc_post
from dsv4.kernels.mhc_post.mhc_post_ref import mhc_post_ref
from dsv4.kernels.mhc_pre.mhc_pre import mhc_pre
from dsv4.kernels.mhc_pre.mhc_pre_ref import mhc_pre_ref
from dsv4.kernels.q_norm_rope.q_norm_rope import q_norm_rope
from dsv4.kernels.q_norm_rope.q_norm_rope_ref import q_norm_rope_ref
from dsv4.kernels.rms_norm.rms_norm import rms_norm
from dsv4.kernels.rms_norm.rms_norm_ref import rms_norm_ref
from dsv4.kernels.rope.rope import rope
from dsv4.kernels.rope.rope_ref import rope_ref
from dsv4.kernels.router.router import router
from dsv4.kernels.router.router_ref import router_ref
from dsv4.kernels.swiglu.swiglu import swiglu
from dsv4.kernels.swiglu.swiglu_ref import swiglu_ref

Tolerances = list[Tensor | None]
OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "rms_norm": (rms_norm, rms_norm_ref),
    "rope": (rope, rope_ref),
    "q_norm_rope": (q_norm_rope, q_norm_rope_ref),
    "swiglu": (swiglu, swiglu_ref),
    "mhc_pre": (mhc_pre, mhc_pre_ref),
    "mhc_post": (mhc_post, mhc_post_ref),
    "mhc_head": (mhc_head, mhc_head_ref),
    "router": (router, router_ref),
}
IN_PLACE = {"rope"}
F32_ULP = 2.0**-23
BF16_ULP = 2.0**-7  # of the smallest mantissa: both sides round once, so values that differ a little differ by one
EPS = 1e-6
FLASH, PRO = 4096, 7168  # hidden_size
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


@dataclass(frozen=True)
class Case:
    """Arguments of one call, on the GPU, and how far the kernel may be from the twin."""

    op: str
    name: str
    dtype: str
    args: tuple[Any, ...]
    tolerance: Callable[[tuple[Any, ...], list[Tensor]], Tolerances]
    kwargs: dict[str, Any] = field(default_factory=dict)


class Maker:
    """Seeded tensors on one device."""

    def __init__(self, device: torch.device):
        self.device, self.generator = device, torch.Generator(device).manual_seed(20)

    def normal(self, *shape: int, dtype: str = "f32", scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator, device=self.device) * scale).to(DTYPES[dtype])

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def cis(self, rows: int, dims: int) -> Tensor:
        angles = torch.outer(
            self.integers(0, 1 << 17, rows).float(), 1e4 ** (-torch.arange(dims // 2) / 32).to(self.device)
        )
        return torch.polar(torch.ones_like(angles), angles)


def rounding(expected: Tensor) -> Tensor:
    """One unit in the last place of a BF16 result; nothing for float32."""
    wide = expected.double().abs()
    return wide * BF16_ULP if expected.dtype == torch.bfloat16 else wide * 0


def pairs(x: Tensor) -> Tensor:
    """The length of every channel's pair: what a rotation keeps, and what its rounding is relative to."""
    return x.double().unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(*x.shape[:-1], -1, 2).flatten(-2)


def relative(factor: float) -> Callable[[tuple[Any, ...], list[Tensor]], Tolerances]:
    return lambda args, expected: [rounding(y) + y.double().abs() * factor + 1e-30 for y in expected]


def rope_tolerance(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    y, dims = expected[0], 2 * args[1].shape[1]
    moved = (torch.arange(y.shape[-1], device=y.device) >= y.shape[-1] - dims).double()
    return [(rounding(y) + 2 * F32_ULP * pairs(y)) * moved]  # channels that do not turn keep their bits


def q_tolerance(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    y = expected[0]  # in BF16 the mean may fall on the other side: root and product each one unit away
    return [pairs(y) * (3 * BF16_ULP if y.dtype == torch.bfloat16 else 8 * F32_ULP)]


def bits(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    return [None for _ in expected]


def mix_error(h: Tensor) -> float:
    """Of a mix z of order 1: 16384 or 28672 products summed in another order, 4 * sqrt(terms) * 2^-24."""
    return 4 * (h.shape[1] * h.shape[2]) ** 0.5 * F32_ULP / 2


def collapse_tolerance(h: Tensor, x: Tensor) -> Tensor:
    return rounding(x) + h.double().abs().sum(1) * (mix_error(h) / 4 + 4 * F32_ULP)  # sigmoid' <= 1/4


def pre_tolerance(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    x, post, comb = expected
    z = mix_error(args[0])  # 2 sigmoid' <= 1/2; a softmax entry moves by at most half as much as its logits
    return [collapse_tolerance(args[0], x), torch.full_like(post, z + 1e-6), torch.full_like(comb, z + 1e-6)]


def head_tolerance(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    return [collapse_tolerance(args[0], expected[0])]


def post_tolerance(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    y, h, post, comb = (arg.double().abs() for arg in args)
    terms = torch.einsum("tjk,tjd->tkd", comb, h) + post.unsqueeze(-1) * y.unsqueeze(1)
    return [rounding(expected[0]) + terms * 4 * F32_ULP]


def router_tolerance(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    return [None, expected[1].double().abs() * 8 * F32_ULP]


def cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    """All cases; `quick` keeps small ones of every path, for tools under which a kernel runs a hundred times slower."""
    make = Maker(device)
    for dtype in DTYPES:
        yield from _norms(make, dtype, quick)
        yield from _rotations(make, dtype, quick)
        yield from _activations(make, dtype, quick)
        yield from _streams(make, dtype, quick)
    yield from _routing(make, quick)


def _norms(make: Maker, dtype: str, quick: bool) -> Iterator[Case]:
    shapes = [(3, 128), (1, FLASH), (5, 100), (2, 7), (0, FLASH)]
    shapes += [] if quick else [(1, PRO), (64, FLASH), (64, 1024), (64, 1536), (64, 512), (8192, FLASH), (33, 20000)]
    for rows, n in shapes:
        yield Case(
            "rms_norm",
            f"[{rows}, {n}]",
            dtype,
            (make.normal(rows, n, dtype=dtype, scale=3), make.normal(n), EPS),
            relative(2e-6),
        )
    apart = make.normal(3, 1536 + 8, dtype=dtype)[:, 8 : 8 + 512]
    yield Case("rms_norm", "[3, 512] of [3, 1544]", dtype, (apart, make.normal(512), EPS), relative(2e-6))


def _rotations(make: Maker, dtype: str, quick: bool) -> Iterator[Case]:
    shapes = [(3, 4, 96, 64), (1, 64, 512, 64), (2, 3, 14, 6), (0, 64, 512, 64)]
    shapes += [] if quick else [(1, 128, 512, 64), (64, 64, 512, 64), (64, 64, 128, 64), (4096, 64, 512, 64)]
    for rows, heads, n, dims in shapes:
        x, cis = make.normal(rows, heads, n, dtype=dtype), make.cis(rows, dims)
        yield Case("rope", f"[{rows}, {heads}, {n}]", dtype, (x, cis), rope_tolerance)
        yield Case("q_norm_rope", f"[{rows}, {heads}, {n}]", dtype, (x, cis, EPS), q_tolerance)
    yield Case("rope", "[5, 512]", dtype, (make.normal(5, 512, dtype=dtype), make.cis(5, 64)), rope_tolerance)
    # Sums of rounded squares of 8-bit integers are exact in any order, so every rounding of the twin must be met.
    whole, still = make.integers(-200, 201, 4, 64, 512).to(DTYPES[dtype]), torch.ones(4, 32, dtype=torch.complex64)
    if dtype == "bf16":
        yield Case("q_norm_rope", "exact sums", dtype, (whole, still.to(make.device), EPS), bits)


def _activations(make: Maker, dtype: str, quick: bool) -> Iterator[Case]:
    shapes = [(3, 2048), (5, 33), (0, 2048)]
    shapes += [] if quick else [(1, 2048), (1, 3072), (64, 2048), (64, 3072), (8192, 2048)]
    for rows, n in shapes:
        gate, up = make.normal(rows, n, dtype=dtype, scale=8), make.normal(rows, n, dtype=dtype, scale=8)
        yield Case("swiglu", f"[{rows}, {n}] limit 10", dtype, (gate, up, 10.0), relative(1e-6))
    both = make.normal(3, 4100, dtype=dtype, scale=8)
    yield Case("swiglu", "halves of [3, 4100] no limit", dtype, (both[:, :2050], both[:, 2050:], 0.0), relative(1e-6))


def _streams(make: Maker, dtype: str, quick: bool) -> Iterator[Case]:
    sizes = [(1, 256), (3, 100), (35, 64), (2, 7), (0, FLASH)]
    sizes += [] if quick else [(rows, width) for rows in (1, 4, 64) for width in (FLASH, PRO)] + [(2048, FLASH)]
    for rows, width in sizes:
        h, y = make.normal(rows, 4, width, dtype=dtype), make.normal(rows, width, dtype=dtype)
        fn = make.normal(24, 4 * width, scale=(4 * width) ** -0.5)
        base, scale = make.normal(24), torch.tensor([0.7] * 4 + [1.3] * 4 + [0.9] * 16, device=make.device)
        name = f"[{rows}, 4, {width}]"
        eps = {"hc_eps": 1e-6, "norm_eps": EPS}
        yield Case("mhc_pre", name, dtype, (h, fn, base, scale), pre_tolerance, {"sinkhorn_iters": 20, **eps})
        yield Case("mhc_head", name, dtype, (h, fn[:4], base[:4], scale[:1]), head_tolerance, eps)
        post, comb = make.uniform(rows, 4), make.uniform(rows, 4, 4)
        yield Case("mhc_post", name, dtype, (y, h, post, comb), post_tolerance)


def _routing(make: Maker, quick: bool) -> Iterator[Case]:
    sizes = [(3, 256, 6), (5, 7, 3), (0, 256, 6)]
    sizes += [] if quick else [(1, 256, 6), (1, 384, 6), (64, 256, 6), (64, 384, 6), (8192, 384, 6)]
    for rows, experts, topk in sizes:
        tokens, how = make.integers(0, 1000, rows), {"topk": topk, "route_scale": 1.5}
        logits, bias = make.normal(rows, experts, scale=4), make.normal(experts)
        name = f"[{rows}, {experts}] top {topk}"
        yield Case("router", name, "f32", (logits, bias, None, tokens), router_tolerance, how)
        ties = make.integers(0, 3, rows, experts).float()  # three values only: the order among equals decides
        yield Case("router", f"{name} ties", "f32", (ties, torch.zeros_like(bias), None, tokens), router_tolerance, how)
        table = make.integers(0, experts, 1000, topk)
        yield Case("router", f"{name} hash", "f32", (logits, None, table, tokens), router_tolerance, how)
    wide = make.normal(9, 300)[:, 20:276]
    how = {"topk": 6, "route_scale": 2.5}
    yield Case(
        "router", "[9, 256] of [9, 300]", "f32", (wide, None, None, make.integers(0, 9, 9)), router_tolerance, how
    )
