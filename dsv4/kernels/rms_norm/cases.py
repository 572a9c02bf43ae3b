"""Cases of rms_norm."""

from collections.abc import Iterator

from dsv4.kernels.case import DTYPES, EPS, FLASH, PRO, Case, Maker, relative
from dsv4.kernels.rms_norm.rms_norm import rms_norm
from dsv4.kernels.rms_norm.rms_norm_ref import rms_norm_ref


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    shapes = [(3, 128), (1, FLASH), (5, 100), (2, 7), (0, FLASH)]
    shapes += [] if quick else [(1, PRO), (64, FLASH), (64, 1024), (64, 1536), (64, 512), (8192, FLASH), (33, 20000)]
    for dtype in DTYPES:
        inputs = [(f"[{rows}, {n}]", make.normal(rows, n, dtype=dtype, scale=3)) for rows, n in shapes]
        inputs.append(("[3, 512] of [3, 1544]", make.normal(3, 1536 + 8, dtype=dtype)[:, 8 : 8 + 512]))
        for name, x in inputs:
            args = (x, make.normal(x.shape[1]), EPS)
            yield Case("rms_norm", name, dtype, rms_norm, rms_norm_ref, args, relative(2e-6))
