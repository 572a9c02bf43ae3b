"""Cases of mhc_pre."""

from collections.abc import Iterator

import torch

from dsv4.kernels.case import DTYPES, EPS, Case, Maker
from dsv4.kernels.mhc_pre.mhc_pre import mhc_pre
from dsv4.kernels.mhc_pre.mhc_pre_ref import mhc_pre_ref
from dsv4.kernels.mhc_pre.tolerances import LARGE, SMALL, pre_tolerance


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    for dtype in DTYPES:
        for rows, width in SMALL if quick else SMALL + LARGE:
            h, fn = make.normal(rows, 4, width, dtype=dtype), make.normal(24, 4 * width, scale=(4 * width) ** -0.5)
            base, scale = make.normal(24), torch.tensor([0.7] * 4 + [1.3] * 4 + [0.9] * 16, device=make.device)
            how = {"sinkhorn_iters": 20, "hc_eps": 1e-6, "norm_eps": EPS}
            args, name = (h, fn, base, scale), f"[{rows}, 4, {width}]"
            yield Case("mhc_pre", name, dtype, mhc_pre, mhc_pre_ref, args, pre_tolerance, how)
