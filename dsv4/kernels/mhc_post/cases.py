"""Cases of mhc_post."""

from collections.abc import Iterator

from dsv4.kernels.case import DTYPES, Case, Maker
from dsv4.kernels.mhc_post.mhc_post import mhc_post
from dsv4.kernels.mhc_post.mhc_post_ref import mhc_post_ref
from dsv4.kernels.mhc_pre.tolerances import LARGE, SMALL, post_tolerance


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    for dtype in DTYPES:
        for rows, width in SMALL if quick else SMALL + LARGE:
            y, h = make.normal(rows, width, dtype=dtype), make.normal(rows, 4, width, dtype=dtype)
            args, name = (y, h, make.uniform(rows, 4), make.uniform(rows, 4, 4)), f"[{rows}, 4, {width}]"
            yield Case("mhc_post", name, dtype, mhc_post, mhc_post_ref, args, post_tolerance)
