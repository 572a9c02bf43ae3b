"""Cases of quantize, quantize_act and swiglu_quantize: every bit is the contract."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.case import DTYPES, FLASH, PRO, Case, Maker, bits, relative
from dsv4.kernels.quantize.quantize import quantize
from dsv4.kernels.quantize.quantize_act import quantize_act
from dsv4.kernels.quantize.quantize_act_ref import quantize_act_ref
from dsv4.kernels.quantize.quantize_ref import quantize_ref
from dsv4.kernels.quantize.swiglu_quantize import swiglu_quantize
from dsv4.kernels.quantize.swiglu_quantize_ref import swiglu_quantize_ref
from dsv4.kernels.swiglu.swiglu import swiglu
from dsv4.quant.activations import Treatment

LIMIT = 10.0


def raw(results: list[Tensor]) -> list[Tensor]:
    """Minus zero is a code of its own, so values are compared as bits; any NaN is as good as another."""
    return [one_nan(x).view(torch.int16 if x.dtype == torch.bfloat16 else torch.uint8) for x in results]


def raw_codes(results: list[Tensor]) -> list[Tensor]:
    """The same of codes, scales and globals; codes of a group whose scale is NaN are nobody's business."""
    codes, scales, globals_ = results
    unknown = scales.float().isnan().repeat_interleave(codes.shape[-1] // max(scales.shape[-1], 1), dim=-1)
    return [codes.masked_fill(unknown, 0), one_nan(scales.float()), one_nan(globals_).view(torch.uint8)]


def one_nan(x: Tensor) -> Tensor:
    return x.masked_fill(x.isnan(), float("nan"))


def values_of(call: Callable[..., Any], how: Treatment) -> Callable[..., Any]:
    """`call` as check_case wants it: with `out`, and one result where there is no row scale."""

    def run(*args: Any, out: Any = None, **kwargs: Any) -> Any:
        if how == "nvfp4":
            return call(*args, how, **kwargs, **({} if out is None else {"out": out}))
        if out is None or not out.is_cuda:
            values = call(*args, how, **kwargs)[0]
            return values if out is None else out.copy_(values)
        return call(*args, how, **kwargs, out=(out, None))[0]

    return run


def edges(make: Maker, columns: int) -> Tensor:
    """Rows of zeros, of one value, of ties between codes, of both ends of BF16, of groups far apart, of integers, and
    one NaN or Inf among integers."""
    x = torch.zeros(12, columns)
    x[1, 3], x[2, 0] = -1.0, 2.0**-100
    ties = [0.25, -0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0, 6.0, 0.0, -0.0, 0.5, 1.0, 2.0, 4.0]
    x[3] = torch.tensor(ties).repeat(columns // 16)
    x[4] = x[3] * 448
    x[5] = torch.linspace(-3.38e38, 3.38e38, columns, dtype=torch.float64)  # its length is beyond float32
    x[6] = torch.logspace(-38, 38, columns)
    x[7] = torch.logspace(-6, 0, columns).flip(0)
    x[8] = torch.arange(columns) % 41 - 20
    x[9, : columns // 2] = 2.0**-130
    x[10:] = x[8]
    x[10, 37], x[11, 5] = float("nan"), float("inf")
    return x.to(make.device).bfloat16()


def inputs(make: Maker, dtype: str, quick: bool) -> dict[str, Tensor]:
    shapes = [(3, 128), (1, FLASH), (5, 48), (0, 64)]
    shapes += [] if quick else [(1, PRO), (64, FLASH), (64, 2048), (64, 3072), (4096, FLASH), (7, 16384), (2, 32768)]
    found = {f"[{t}, {k}]": make.normal(t, k, dtype=dtype, scale=3) for t, k in shapes}
    found["[3, 512] of [3, 1544]"] = make.normal(3, 1544, dtype=dtype)[:, 8:520]
    found["[3, 64] of [3, 203]"] = make.normal(3, 203, dtype=dtype)[:, 3:67]
    found["[2, 3, 96]"] = make.normal(2, 3, 96, dtype=dtype)
    found["edges"] = edges(make, 256).to(DTYPES[dtype])
    return found


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    treatments: tuple[Treatment, ...] = ("nvfp4", "fp8", "none")
    for dtype in DTYPES:
        for name, x in inputs(make, dtype, quick).items():
            yield Case("quantize", name, dtype, quantize, quantize_ref, (x,), bits, view=raw_codes)
            for how in treatments:
                label = f"act {how} {name}"
                run, twin = values_of(quantize_act, how), values_of(quantize_act_ref, how)
                yield Case("quantize", label, dtype, run, twin, (x,), bits, view=raw)
        for k in (100, 7, 130):
            x, run, twin = (
                make.normal(3, k, dtype=dtype),
                values_of(quantize_act, "fp8"),
                values_of(quantize_act_ref, "fp8"),
            )
            yield Case("quantize", f"act fp8 [3, {k}]", dtype, run, twin, (x,), bits)
        yield from activations(make, dtype, treatments, quick)


def unfused(
    gate: Tensor, up: Tensor, weights: Tensor | None, how: Treatment, *, limit: float
) -> tuple[Tensor, Tensor | None]:
    """The same by the swiglu kernel and the quantiser's twin: the exponential is the same, so bits are the contract."""
    a = swiglu(gate.float().contiguous(), up.float().contiguous(), limit)
    if weights is not None:
        a = a * weights.unsqueeze(-1)
    return quantize_act_ref(a.bfloat16(), how)


def activations(make: Maker, dtype: str, treatments: tuple[Treatment, ...], quick: bool) -> Iterator[Case]:
    shapes = [(3, 128), (0, 64)] + ([] if quick else [(6, 2048), (6, 3072), (384, 2048), (8192, 2048)])
    pairs = {f"[{t}, {f}]": make.normal(t, 2 * f, dtype=dtype, scale=8).chunk(2, dim=-1) for t, f in shapes}
    both = make.normal(5, 4100, dtype=dtype, scale=8)
    pairs["odd and even columns of [5, 4100]"] = both[:, 4:4100:2], both[:, 5:4100:2]
    pairs["edges"] = edges(make, 256).to(DTYPES[dtype])[:, :128], edges(make, 256).to(DTYPES[dtype])[:, 128:]
    kwargs = {"limit": LIMIT}
    for name, (gate, up) in pairs.items():
        weights = make.uniform(len(gate))
        for how in treatments:
            run, twin, label = values_of(swiglu_quantize, how), values_of(unfused, how), f"swiglu {how} {name}"
            yield Case("quantize", label, dtype, run, twin, (gate, up, weights), bits, kwargs, view=raw)
        run, twin = values_of(swiglu_quantize, "none"), values_of(swiglu_quantize_ref, "none")
        yield Case("quantize", f"swiglu {name}", dtype, run, twin, (gate, up, None), relative(1e-6), kwargs)
