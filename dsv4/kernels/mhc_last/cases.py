"""Cases of mhc_last: those of mhc_seam, but for the site that begins."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.case import DTYPES, EPS, Case, Maker, Tolerances, bits
from dsv4.kernels.mhc_head.mhc_head import mhc_head
from dsv4.kernels.mhc_last.mhc_last import mhc_last
from dsv4.kernels.mhc_last.mhc_last_ref import mhc_last_ref
from dsv4.kernels.mhc_post.mhc_post import mhc_post
from dsv4.kernels.mhc_pre.tolerances import LARGE, SMALL, collapse_tolerance, post_tolerance
from dsv4.kernels.mhc_seam.cases import LARGE_RANKS, RANKS, echo


def tolerance(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    """mhc_post's for h'. For x what mhc_head may be off by, and what follows from h', as in mhc_seam: one unit of 2^-8
    in elements of h' that lie at a rounding boundary, which moves a mix by no more than 2^-11."""
    new, x = expected
    streams = new.double().abs().sum(1)
    moved = streams * (2.0**-11 / 4 + 2.0**-8) if new.dtype == torch.bfloat16 else 0.0
    return [*post_tolerance(args[:4], [new]), collapse_tolerance(new, x) + moved]


def apart(*args: Tensor, peers: Any = None, **how: Any) -> list[Tensor]:
    """By the ops that it joins."""
    y, h, post, comb, *head = args
    h = mhc_post(y if peers is None else peers.total(y).to(h.dtype), h, post, comb)
    return [h, mhc_head(h, *head, **how)]


def arguments(make: Maker, rows: int, width: int, dtype: str, part: str) -> tuple[Tensor, ...]:
    y, h = make.normal(rows, width, dtype=part), make.normal(rows, 4, width, dtype=dtype)
    post, comb = make.uniform(rows, 4) * 2, make.uniform(rows, 4, 4) / 2
    fn, scale = make.normal(4, 4 * width, scale=(4 * width) ** -0.5), torch.full((1,), 0.7, device=make.device)
    return y, h, post, comb, fn, make.normal(4), scale


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    how: dict[str, Any] = {"hc_eps": 1e-6, "norm_eps": EPS}
    for dtype in DTYPES:
        for rows, width in SMALL if quick else [*SMALL, (5, 4096), (2, 7168), (8, 4096), (8, 7168), *LARGE]:
            args, name = arguments(make, rows, width, dtype, dtype), f"[{rows}, 4, {width}]"
            yield Case("mhc_last", name, dtype, mhc_last, mhc_last_ref, args, tolerance, how)
            yield Case("mhc_last", f"{name}, the ops apart", dtype, mhc_last, apart, args, bits, how)
        for rows, width, rank, size in RANKS if quick else RANKS + LARGE_RANKS:
            args, peers = arguments(make, rows, width, dtype, "f32"), echo(rank, size, make.device)
            name, among = f"[{rows}, 4, {width}], rank {rank} of {size}", how | {"peers": peers}
            yield Case("mhc_last", name, dtype, mhc_last, apart, args, bits, among)
