"""RoPE frequencies: plain for window-only layers, YaRN for layers with a compressor; no mscale."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv4.config import YarnScaling


def frequencies(theta: float, rope_dims: int, yarn: YarnScaling | None) -> Tensor:
    """[R/2] float32: theta^(-2i/R); with YaRN, high frequencies kept, low ones divided by `factor`, a ramp between."""
    freqs = 1.0 / (theta ** (torch.arange(0, rope_dims, 2, dtype=torch.float32) / rope_dims))
    if yarn is None:
        return freqs

    def corrected(rotations: float) -> float:
        span = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return rope_dims * math.log(span) / (2 * math.log(theta))

    low = max(math.floor(corrected(yarn.beta_fast)), 0)
    high = min(math.ceil(corrected(yarn.beta_slow)), rope_dims - 1)
    width = max(high - low, 0.001)  # a ramp of no width is a step
    ramp = ((torch.arange(rope_dims // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return freqs / yarn.factor * ramp + freqs * (1 - ramp)


def cis(positions: Tensor, freqs: Tensor) -> Tensor:
    """positions [T] i64, freqs [n, R/2] f32 -> [n, T, R/2] complex64 cos + i sin of the float32 product."""
    angles = positions.float().unsqueeze(-1) * freqs.unsqueeze(1)
    return torch.polar(torch.ones_like(angles), angles)
