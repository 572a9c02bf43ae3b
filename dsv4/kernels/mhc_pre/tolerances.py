"""How far an mHC site's kernel may be from its twin, and the sizes at which they meet."""

from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.case import F32_ULP, FLASH, PRO, Tolerances, rounding

SMALL = [(1, 256), (3, 100), (35, 64), (2, 7), (0, FLASH)]
LARGE = [(rows, width) for rows in (1, 4, 64) for width in (FLASH, PRO)] + [(2048, FLASH)]


def mix_error(h: Tensor) -> float:
    """Of a mix z of order 1: 16384 or 28672 products summed in another order, 4 * sqrt(terms) * 2^-24."""
    return 4 * (h.shape[1] * h.shape[2]) ** 0.5 * F32_ULP / 2


def collapse_tolerance(h: Tensor, x: Tensor) -> Tensor:
    return rounding(x) + h.double().abs().sum(1) * (mix_error(h) / 4 + 4 * F32_ULP)  # sigmoid' <= 1/4


def pre_tolerance(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    x, post, comb = expected
    z = mix_error(args[0])  # 2 sigmoid' <= 1/2; a softmax entry moves by at most half as much as its logits
    return [collapse_tolerance(args[0], x), torch.full_like(post, z + 1e-6), torch.full_like(comb, z + 1e-6)]


def post_tolerance(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    y, h, post, comb = (arg.double().abs() for arg in args)
    terms = torch.einsum("tjk,tjd->tkd", comb, h) + post.unsqueeze(-1) * y.unsqueeze(1)
    return [rounding(expected[0]) + terms * 4 * F32_ULP]


def head_tolerance(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    return [collapse_tolerance(args[0], expected[0])]
