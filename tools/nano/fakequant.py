"""Differentiable quantisers: the value a stored number would have, with the gradient of the identity
(straight-through).

Rules are SPEC 2.0 and 3.2 and NVFP4: E4M3 and E2M1 round to nearest, ties to even; power-of-two scales are rounded up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Quant:
    """What is quantised in a forward pass.

    weights  "none" | "native" (experts NVFP4, MTP experts MXFP4, attention and shared experts FP8) | "nvfp4" (every
             large linear)
    act      "bf16" | "fp8" (1x128 before FP8 and FP4 weights) | "nvfp4" (before NVFP4 weights; fp8 before FP8 ones)
    kv       FP8 on the first 448 dims of window and compressed KV; index: Hadamard + FP4 on the indexer's q and k
    """

    weights: str = "none"
    act: str = "bf16"
    kv: bool = False
    index: bool = False


def straight_through(x: Tensor, q: Tensor) -> Tensor:
    return x + (q.to(x.dtype) - x).detach()


def power_of_two_at_least(x: Tensor) -> Tensor:
    """2^ceil(log2 x) for normal float32 x > 0, by its bits as the official kernel does."""
    bits = x.contiguous().view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).int()
    return (exponent << 23).view(torch.float32)


def round_e2m1(x: Tensor) -> Tensor:
    a = x.abs().clamp(max=6.0)
    step = torch.where(a < 2.0, 0.5, torch.where(a < 4.0, 1.0, 2.0))
    return torch.copysign(torch.round(a / step) * step, x)


def round_e4m3(x: Tensor) -> Tensor:
    return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float()


@torch.no_grad()
def fp8_groups(x: Tensor, group: int) -> Tensor:
    """act_quant of SPEC 2.0 over groups of the last dim."""
    g = x.float().unflatten(-1, (-1, group))
    s = power_of_two_at_least(g.abs().amax(-1, keepdim=True).clamp(min=1e-4) * (1.0 / 448.0))
    return (round_e4m3(g / s) * s).flatten(-2)


@torch.no_grad()
def fp4_groups(x: Tensor, group: int = 32) -> Tensor:
    """fp4_act_quant of SPEC 2.0; also the MXFP4 weight rule."""
    g = x.float().unflatten(-1, (-1, group))
    s = power_of_two_at_least(g.abs().amax(-1, keepdim=True).clamp(min=6 * 2.0**-126) / 6.0)
    return (round_e2m1(g / s) * s).flatten(-2)


@torch.no_grad()
def fp8_blocks(w: Tensor) -> Tensor:
    """128x128 blocks with a power-of-two scale; both dims multiples of 128."""
    n, k = w.shape
    b = w.float().view(n // 128, 128, k // 128, 128)
    s = power_of_two_at_least(b.abs().amax((1, 3), keepdim=True).clamp(min=1e-30) / 448.0)
    return (round_e4m3(b / s) * s).view(n, k)


@torch.no_grad()
def nvfp4(x: Tensor, amax: Tensor) -> Tensor:
    """Two-level NVFP4 of the last dim in blocks of 16; `amax` broadcasts against x and gives the global scale
    amax/2688."""
    g = x.float().unflatten(-1, (-1, 16))
    global_scale = (amax.float() / 2688.0).clamp(min=1e-30).unsqueeze(-1)
    s = g.abs().amax(-1, keepdim=True) / (6.0 * global_scale)
    s = s.clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn).float() * global_scale
    return (round_e2m1(g / s) * s).flatten(-2)


def nvfp4_rows(x: Tensor) -> Tensor:
    return nvfp4(x, x.abs().amax(-1, keepdim=True))


def weight(w: Tensor, kind: str, quant: Quant) -> Tensor:
    """A linear weight as it will be stored. kind: "fp8", "mxfp4", "large" (BF16, requantised by the nvfp4 policy),
    "plain"."""
    if quant.weights == "none" or kind == "plain":
        return w
    stored = fp8_blocks(w) if kind == "fp8" else fp4_groups(w) if kind == "mxfp4" else w.detach()
    if quant.weights == "nvfp4" and kind in ("fp8", "large"):
        stored = nvfp4(stored, stored.abs().amax())
    return straight_through(w, stored)


def expert_weights(w1: Tensor, w2: Tensor, w3: Tensor, kind: str, quant: Quant) -> tuple[Tensor, Tensor, Tensor]:
    """Stacked expert weights [E, N, K]; in NVFP4 w1 and w3 of an expert share the global scale."""
    if quant.weights == "none":
        return w1, w2, w3
    if kind == "mxfp4":
        return (
            straight_through(w1, fp4_groups(w1)),
            straight_through(w2, fp4_groups(w2)),
            straight_through(w3, fp4_groups(w3)),
        )
    up = torch.maximum(w1.detach().abs().amax((1, 2), keepdim=True), w3.detach().abs().amax((1, 2), keepdim=True))
    down = w2.detach().abs().amax((1, 2), keepdim=True)
    return (
        straight_through(w1, nvfp4(w1, up)),
        straight_through(w2, nvfp4(w2, down)),
        straight_through(w3, nvfp4(w3, up)),
    )


def activation(x: Tensor, kind: str, quant: Quant) -> Tensor:
    """The input of a linear whose weight is of `kind` ("nvfp4" for the trunk's routed experts)."""
    if quant.act == "bf16" or kind == "plain":
        return x
    four_bits = kind == "nvfp4" or (quant.weights == "nvfp4" and kind in ("fp8", "large", "grouped"))
    if quant.act == "nvfp4" and four_bits:
        return straight_through(x, nvfp4_rows(x))
    return x if kind in ("large", "grouped") else straight_through(x, fp8_groups(x, 128))


def kv_cache(x: Tensor, quant: Quant) -> Tensor:
    """A KV entry [..., 512]: the 448 dims without position in FP8, groups of 64; the 64 RoPE dims as they are."""
    if not quant.kv:
        return x
    return torch.cat([straight_through(x[..., :-64], fp8_groups(x[..., :-64], 64)), x[..., -64:]], -1)


def hadamard(x: Tensor) -> Tensor:
    """Natural-order Walsh-Hadamard transform of the last dim, normalised."""
    n = x.shape[-1]
    y, h = x.float(), 1
    while h < n:
        y = y.unflatten(-1, (n // (2 * h), 2, h))
        y = torch.stack([y[..., 0, :] + y[..., 1, :], y[..., 0, :] - y[..., 1, :]], -2).flatten(-3)
        h *= 2
    return (y * n**-0.5).to(x.dtype)


def index_vector(x: Tensor, quant: Quant) -> Tensor:
    if not quant.index:
        return x
    y = hadamard(x)
    return straight_through(y, fp4_groups(y))
