"""Cases of kv_append: entries as values and as bytes, which the tolerance reads back."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.case import DTYPES, EPS, Case, Maker, Tolerances, bits, nbytes
from dsv4.kernels.kv_append import intervals
from dsv4.kernels.kv_append.kv_append import kv_append
from dsv4.kernels.kv_append.kv_append_ref import kv_append_ref
from dsv4.quant import kv as formats


def case(
    make: Maker, name: str, kv: Tensor, cis: Tensor, form: str, write_to: Tensor, write_rows: Tensor | None = None,
    exact: bool = False,
) -> Case:  # fmt: skip
    """form: plain | rounded | packed. write_to -1: not written."""
    rows, n = kv.shape
    dims, dtype = 2 * cis.shape[1], kv.dtype
    packed = form == "packed"
    width = formats.entry_bytes(n, dims) if packed else n
    slots = int(write_to.max()) // 128 + 1 if write_to.numel() else 1
    ring = make.integers(0, 100, max(slots, 1), 128, width).to(torch.uint8 if packed else dtype)
    weight = torch.ones(n, device=make.device) if exact else make.normal(n)
    if write_rows is None:
        write_rows = torch.arange(rows, device=make.device)

    def view(results: list[Tensor]) -> list[Tensor]:
        if not packed:
            return results
        entry, ring = results
        return [formats.unpack_entry(entry, n, dims), ring[..., n + dims + (n - dims) // 64 :],
                formats.unpack_entry(ring, n, dims)]  # fmt: skip

    def tolerance(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
        made = intervals.norm(intervals.spread(kv.double(), 0.0), weight, EPS, dtype)
        made = intervals.rope(made, cis, dtype)
        if form != "plain":
            made = intervals.entry(made, dims)
        result = intervals.tolerance(made, expected[0])
        places = torch.zeros_like(expected[-1], dtype=torch.float64)  # what is not written keeps its bits
        live = write_to >= 0
        places.view(-1, n)[write_to[live]] = result[write_rows[live]]
        return [result, *([None] if packed else []), places]

    label = "bf16" if dtype == torch.bfloat16 else "f32"
    args = kv, weight, cis, ring, write_rows, write_to
    element = ring.element_size()
    moved = nbytes(kv, weight, cis, write_to) + (rows + len(write_to)) * width * element
    how = {"eps": EPS, "quantize": form != "plain"}
    return Case("kv_append", f"{name} {form}", label, kv_append, kv_append_ref, args, bits if exact else tolerance, how,
                in_place=(3,), view=view, moved=moved)  # fmt: skip


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    shapes = [(3, 512, 64), (1, 80, 16), (5, 134, 6), (0, 512, 64), (1, 512, 64)]
    shapes += [] if quick else [(64, 512, 64), (4096, 512, 64)]
    for dtype in DTYPES:
        for form in ("plain", "rounded", "packed") if dtype == "bf16" else ("plain", "rounded"):
            for rows, n, dims in shapes:
                to = torch.randperm(128 * (rows // 64 + 1), device=make.device, generator=make.generator)[:rows]
                kv, cis = make.normal(rows, n, dtype=dtype, scale=3), make.cis(rows, dims)
                yield case(make, f"[{rows}, {n}]", kv, cis, form, to)
            yield from _special(make, dtype, form)


def _special(make: Maker, dtype: str, form: str) -> Iterator[Case]:
    wide = make.normal(6, 1552, dtype=dtype)[:, 1024:1536]  # a column slice, as the projections give it
    to = torch.tensor([3, -1, 250, 7, -1, -1], device=make.device)
    yield case(make, "[6, 512] of [6, 1552], padding rows", wide, make.cis(6, 64), form, to)
    # A chunk of two sequences, longer than the window: the last 128 rows of one, all 20 of the other.
    kept = torch.cat([torch.arange(170 - 128, 170), torch.arange(170, 190)]).to(make.device)
    to = torch.cat([128 + torch.arange(42, 170) % 128, torch.arange(20)]).to(make.device)
    yield case(make, "[190, 512] of a chunk", make.normal(190, 512, dtype=dtype), make.cis(190, 64), form, to, kept)
    # Largest and smallest values beside zeros; a row of zeros.
    scale = 2.0 ** make.integers(-60, 60, 8, 512).float()
    far = (make.normal(8, 512) * scale * (make.uniform(8, 512) > 0.3)).to(DTYPES[dtype])
    far[3] = 0
    yield case(make, "[8, 512] far apart", far, make.cis(8, 64), form, torch.arange(8, device=make.device))
    # Sums of squares of small integers are exact in any order, so every rounding of the twin must be met.
    whole = make.integers(-150, 151, 16, 512).to(DTYPES[dtype])
    still = torch.ones(16, 32, dtype=torch.complex64, device=make.device)
    yield case(make, "exact sums", whole, still, form, torch.arange(16, device=make.device), exact=True)
