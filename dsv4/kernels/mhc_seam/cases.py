"""Cases of mhc_seam."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.case import DTYPES, EPS, F32_ULP, Case, Maker, Tolerances, rounding
from dsv4.kernels.mhc_pre.tolerances import LARGE, SMALL, mix_error, post_tolerance
from dsv4.kernels.mhc_seam.mhc_seam import mhc_seam
from dsv4.kernels.mhc_seam.mhc_seam_ref import mhc_seam_ref


def tolerance(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    """mhc_post's for h', then what follows from h'.

    In BF16 an element of h' that lies within float32's error of a rounding boundary may fall on the other side, one
    unit of 2^-8 away. Fewer than 2^-10 of them do; that moves a mix, whose terms are of order (M D)^-1/2, by no more
    than 4 deviations: 4 * 2^-5 * 2^-8. And it moves x there by the weight of that stream.
    """
    y, h, post, comb, *_, weight = args
    new, x, new_post, new_comb = expected
    halved = h.dtype == torch.bfloat16
    z = mix_error(h) + (2.0**-11 if halved else 0.0)
    streams = new.double().abs().sum(1)
    inner = (new.double() * _pre(args, new).unsqueeze(-1)).sum(1)
    scale = (inner.square().mean(-1, keepdim=True) + EPS).rsqrt()
    moved = rounding(inner.to(h.dtype)) + streams * (z / 4 + 4 * F32_ULP + (2.0**-8 if halved else 0.0))
    bound = rounding(x) + moved * scale * weight.double().abs() + x.double().abs() * z
    # Sinkhorn: each of its 40 steps rounds, here and in the twin
    mixed = torch.full_like(new_comb, z + 80 * 2.0**-24)
    return [*post_tolerance((y, h, post, comb), [new]), bound, torch.full_like(new_post, z + 1e-6), mixed]


def _pre(args: tuple[Any, ...], new: Tensor) -> Tensor:
    fn, base, scale = (arg[:4].double() for arg in args[4:7])
    v = new.double().flatten(1)
    return torch.sigmoid((v @ fn.T) * (v.square().mean(1, keepdim=True) + EPS).rsqrt() * scale + base) + 1e-6


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    how = {"sinkhorn_iters": 20, "hc_eps": 1e-6, "norm_eps": EPS}
    for dtype in DTYPES:
        for rows, width in SMALL if quick else [*SMALL, (5, 4096), (2, 7168), (16, 4096), *LARGE]:
            y, h = make.normal(rows, width, dtype=dtype), make.normal(rows, 4, width, dtype=dtype)
            post, comb = make.uniform(rows, 4) * 2, make.uniform(rows, 4, 4) / 2
            fn, base = make.normal(24, 4 * width, scale=(4 * width) ** -0.5), make.normal(24)
            scale = torch.tensor([0.7] * 4 + [1.3] * 4 + [0.9] * 16, device=make.device)
            args = y, h, post, comb, fn, base, scale, make.normal(width)
            yield Case("mhc_seam", f"[{rows}, 4, {width}]", dtype, mhc_seam, mhc_seam_ref, args, tolerance, how)
    # Sums of small whole numbers are exact in any order: h' must be met bit for bit.
    y, h = make.integers(-8, 9, 3, 128).bfloat16(), make.integers(-8, 9, 3, 4, 128).bfloat16()
    post, comb = make.integers(0, 3, 3, 4).float(), make.integers(0, 3, 3, 4, 4).float()
    args = y, h, post, comb, make.normal(24, 512, scale=512**-0.5), base, scale, make.normal(128)
    yield Case("mhc_seam", "exact streams", "bf16", mhc_seam, mhc_seam_ref, args, exact, how)


def exact(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    return [None, *tolerance(args, expected)[1:]]
