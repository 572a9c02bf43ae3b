"""Cases of attn_inputs: one launch against the launches of its ops, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.attn_inputs.attn_inputs import attn_inputs
from dsv4.kernels.case import DTYPES, EPS, Case, Maker, bits, nbytes
from dsv4.kernels.compress.cases import EDGES, KINDS, SMALL, Kind, chunk_rows, decode_rows
from dsv4.kernels.compress.compress import compress
from dsv4.kernels.compress.rows import Compression, CompressRows
from dsv4.kernels.kv_append.kv_append import kv_append
from dsv4.kernels.rms_norm.rms_norm import rms_norm
from dsv4.quant import kv as formats

PAGES = 18


def apart(
    qr: Tensor, q_weight: Tensor, kv: Tensor, kv_weight: Tensor, cis: Tensor, ring: Tensor, write_rows: Tensor,
    write_to: Tensor, compressions: list[Compression], *, eps: float, quantize: bool, out: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    for c in compressions:
        compress(*c[:8], eps=c.eps, dtype=c.dtype, index=c.keys, quantize=c.quantize)
    entry = kv_append(kv, kv_weight, cis, ring, write_rows, write_to, eps=eps, quantize=quantize)
    return rms_norm(qr, q_weight, eps), entry


def compression(make: Maker, kind: Kind, rows: CompressRows, dtype: str, form: str) -> Compression:
    both = make.normal(len(rows.phase), 2 * kind.channels + 4, scale=2)
    u, g = both[:, : kind.channels], both[:, kind.channels : 2 * kind.channels]
    slots = int(rows.write_to.max()) // kind.n + 1
    state = make.normal(slots, kind.n, 2 * kind.channels, scale=2)
    width, kept = kind.width, torch.uint8 if form == "packed" else DTYPES[dtype]
    if form == "packed":
        width = formats.index_key_bytes(width) if kind.index else formats.entry_bytes(width, kind.dims)
    pool = make.integers(0, 100, PAGES, 64, width).to(kept)
    cis = make.cis(len(rows.entry_to), kind.dims)
    ape, weight = make.normal(kind.ratio, kind.channels), make.normal(kind.width)
    return Compression(u, g, ape, weight, state, pool, rows, cis, EPS, DTYPES[dtype], kind.index, form != "plain")


def case(make: Maker, name: str, kinds: list[Kind], rows: list[CompressRows], dtype: str, form: str) -> Case:
    """form: plain | rounded | packed."""
    tokens = len(rows[0].phase) if rows else 5
    width, dims = (kinds[0].width, kinds[0].dims) if kinds else (512, 64)
    parts = [compression(make, kind, part, dtype, form) for kind, part in zip(kinds, rows, strict=True)]
    inputs = make.normal(tokens, 1024 + width, dtype=dtype)  # slices of one product, as the projections give them
    qr, kv = inputs[:, :1024], inputs[:, 1024:]
    stored = formats.entry_bytes(width, dims) if form == "packed" else width
    ring = make.integers(0, 100, tokens // 64 + 2, 128, stored).to(torch.uint8 if form == "packed" else DTYPES[dtype])
    write_to = torch.randperm(128 * (tokens // 64 + 2), device=make.device, generator=make.generator)[:tokens]
    write_to[tokens // 2] = -1 if tokens > 1 else write_to[0]
    every = torch.arange(tokens, device=make.device)
    args: list[Any] = [qr, make.normal(1024), kv, make.normal(width), make.cis(tokens, dims), ring, every, write_to]
    buffers = [buffer for part in parts for buffer in (part.state, part.pool)]

    def joined(op: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **how: Any) -> Any:
            held = given[8:]
            made = [p._replace(state=held[2 * i], pool=held[2 * i + 1]) for i, p in enumerate(parts)]
            return op(*given[:8], made, **how)

        return run

    how = {"eps": EPS, "quantize": form != "plain"}
    moved = 2 * nbytes(qr, kv) + sum(2 * nbytes(p.u, p.g) for p in parts)
    places = (5, *range(8, 8 + len(buffers)))
    return Case("attn_inputs", f"{name} {form}", dtype, joined(attn_inputs), joined(apart), (*args, *buffers), bits,
                how, in_place=places, moved=moved)  # fmt: skip


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    csa, hca, index = KINDS
    small_csa, small_hca, small_index, _ = SMALL
    sets = {"window": [], "hca": [hca], "csa": [csa, index], "small hca": [small_hca]}
    sets["small csa"] = [small_csa, small_index]
    for dtype, form in (("bf16", "plain"), ("bf16", "rounded"), ("bf16", "packed"), ("f32", "plain")):
        for name, kinds in sets.items():
            if form != "plain" and name == "small csa":
                continue  # 80 - 16 channels are rounded, keys of 32 are not packed beside them in a model
            steps = {"edges": (EDGES, 2)}
            if not quick and dtype == "bf16" and kinds and not name.startswith("small"):
                ratio = kinds[0].ratio
                steps["1 row"], steps["1 row, an entry"] = ([65536], 0), ([ratio * 512 - 1], 0)
                steps["64 rows"] = [128 * b + 127 - b % 2 for b in range(64)], 0
            for label, (positions, padding) in steps.items():
                rows = [decode_rows(kind, positions, padding, False, make) for kind in kinds]
                yield case(make, f"{name}, {label}", kinds, rows, dtype, form)
        rows = [chunk_rows(kind, [(0, 300), (130, 3)], make) for kind in (csa, index)]
        yield case(make, "csa, chunk", [csa, index], rows, dtype, form)
