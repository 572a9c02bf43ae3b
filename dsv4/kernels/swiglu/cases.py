"""Cases of swiglu."""

from collections.abc import Iterator

from dsv4.kernels.case import DTYPES, Case, Maker, relative
from dsv4.kernels.swiglu.swiglu import swiglu
from dsv4.kernels.swiglu.swiglu_ref import swiglu_ref


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    shapes = [(3, 2048), (5, 33), (0, 2048)]
    shapes += [] if quick else [(1, 2048), (1, 3072), (64, 2048), (64, 3072), (8192, 2048)]
    for dtype in DTYPES:
        inputs = {
            f"[{t}, {n}] limit 10": (*(make.normal(t, n, dtype=dtype, scale=8) for _ in range(2)), 10.0)
            for t, n in shapes
        }
        both = make.normal(3, 4100, dtype=dtype, scale=8)
        inputs["halves of [3, 4100] no limit"] = both[:, :2050], both[:, 2050:], 0.0
        for name, args in inputs.items():
            yield Case("swiglu", name, dtype, swiglu, swiglu_ref, args, relative(1e-6))
