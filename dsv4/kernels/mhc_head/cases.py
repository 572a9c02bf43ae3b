"""Cases of mhc_head."""

from collections.abc import Iterator

import torch

from dsv4.kernels.case import DTYPES, EPS, Case, Maker
from dsv4.kernels.mhc_head.mhc_head import mhc_head
from dsv4.kernels.mhc_head.mhc_head_ref import mhc_head_ref
from dsv4.kernels.mhc_pre.tolerances import LARGE, SMALL, head_tolerance


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    for dtype in DTYPES:
        for rows, width in SMALL if quick else SMALL + LARGE:
            h, fn = make.normal(rows, 4, width, dtype=dtype), make.normal(4, 4 * width, scale=(4 * width) ** -0.5)
            args = (h, fn, make.normal(4), torch.full((1,), 0.7, device=make.device))
            how, name = {"hc_eps": 1e-6, "norm_eps": EPS}, f"[{rows}, 4, {width}]"
            yield Case("mhc_head", name, dtype, mhc_head, mhc_head_ref, args, head_tolerance, how)
