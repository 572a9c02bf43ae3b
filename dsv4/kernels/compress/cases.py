"""Cases of compress: decode steps and chunks of CSA, HCA and the indexer, entries as values and as bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.case import DTYPES, EPS, Case, Maker, Tolerances, bits, nbytes
from dsv4.kernels.compress.compress import compress
from dsv4.kernels.compress.compress_ref import compress_ref
from dsv4.kernels.compress.rows import CompressRows
from dsv4.kernels.kv_append import intervals
from dsv4.quant import kv

FEW, MANY, PAGES = 13, 67, 18  # slots of the state, prime; pages of the pool


@dataclass(frozen=True)
class Kind:
    name: str
    ratio: int
    overlap: bool
    width: int
    dims: int
    index: bool = False

    @property
    def n(self) -> int:
        return self.ratio * (1 + self.overlap)

    @property
    def channels(self) -> int:
        return self.width * (1 + self.overlap)


KINDS = [Kind("csa", 4, True, 512, 64), Kind("hca", 128, False, 512, 64), Kind("index", 4, True, 128, 64, True)]
SMALL = [Kind("csa", 4, True, 80, 16), Kind("hca", 16, False, 80, 16), Kind("index", 4, True, 32, 16, True),
         Kind("csa", 3, True, 70, 6)]  # fmt: skip


def decode_rows(kind: Kind, positions: list[int], padding: int, compact: bool, make: Maker) -> CompressRows:
    """One token per sequence. `compact`: only completed entries are listed, as the host's plan does it."""
    count, n, slots = len(positions), kind.n, FEW if len(positions) <= FEW else MANY
    places = torch.randperm(PAGES * 64, generator=make.generator, device=make.device).tolist()
    items, to, starts, write_to = [], [], [], []
    for b, position in enumerate(positions):
        slot = 37 * b % slots
        live, done = b < count - padding, b < count - padding and (position + 1) % kind.ratio == 0
        write_to.append(slot * n + position % n if live else -1)
        if compact and not done:
            continue
        tokens = range(position - n + 1, position + 1)
        items.append([slot * n + t % n if done and t >= 0 else -1 for t in tokens])
        to.append(places[b] if done else -1)
        starts.append(position + 1 - kind.ratio if done else 0)
    phase, every = [p % kind.ratio for p in positions], list(range(count))
    return _rows(make, kind, phase, every, write_to, True, [], items, starts, to)


def chunk_rows(kind: Kind, chunks: list[tuple[int, int]], make: Maker) -> CompressRows:
    """Several tokens per sequence: (start, length) of each."""
    n, ratio, first = kind.n, kind.ratio, 0
    held = sum(s - max(0, s // ratio * ratio + ratio - n) for s, _ in chunks)
    history: list[int] = []
    phase, write_rows, write_to, items, starts = [], [], [], [], []
    for b, (start, length) in enumerate(chunks):
        slot, end, low = 37 * b % FEW, start + length, max(0, start // ratio * ratio + ratio - n)
        row = {t: len(history) + t - low for t in range(low, start)}
        row |= {t: held + first + t - start for t in range(start, end)}
        history += [slot * n + t % n for t in range(low, start)]
        phase += [t % ratio for t in range(start, end)]
        kept = range(max(start, end - n), end)
        write_rows += [first + t - start for t in kept]
        write_to += [slot * n + t % n for t in kept]
        for entry in range(start // ratio, end // ratio):
            last = ratio * (entry + 1)
            items.append([row[t] if t >= 0 else -1 for t in range(last - n, last)])
            starts.append(ratio * entry)
        first += length
    places = torch.randperm(PAGES * 64, generator=make.generator, device=make.device)[: len(items)].tolist()
    return _rows(make, kind, phase, write_rows, write_to, False, history, items, starts, places)


def _rows(make: Maker, kind: Kind, phase: list[int], write_rows: list[int], write_to: list[int], from_state: bool,
          history: list[int], items: list[list[int]], starts: list[int], to: list[int]) -> CompressRows:  # fmt: skip
    def tensor(values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=make.device)

    return CompressRows(
        phase=tensor(phase),
        write_rows=tensor(write_rows),
        write_to=tensor(write_to),
        from_state=from_state,
        history=tensor(history),
        items=tensor(items).view(-1, kind.n),
        entry_positions=tensor(starts),
        entry_to=tensor(to),
    )


def pooled(kind: Kind, u: Tensor, g: Tensor, ape: Tensor, state: Tensor, rows: CompressRows) -> tuple[Tensor, Tensor]:
    """float64 entries [Ne, N] before the norm, and by how much float32 may miss them."""
    fresh = torch.cat([u, g + ape[rows.phase]], -1)
    flat = state.view(-1, state.shape[-1]).clone()
    if rows.from_state:
        flat[rows.write_to[rows.write_to >= 0]] = fresh[rows.write_rows[rows.write_to >= 0]]
    source = flat if rows.from_state else torch.cat([flat[rows.history], fresh])
    value, gate = source[rows.items.clamp(min=0)].double().chunk(2, -1)
    if kind.overlap:
        half = kind.ratio
        value, gate = (torch.cat([x[:, :half, : kind.width], x[:, half:, kind.width :]], 1) for x in (value, gate))
    absent = (rows.items < 0).unsqueeze(-1)
    value, gate = value.masked_fill(absent, 0), gate.masked_fill(absent, float("-inf"))
    depth = gate.amax(1, keepdim=True) - gate  # exp of a rounded difference: an error that grows with it
    weight = torch.softmax(gate, 1)
    slack = (weight * value.abs() * (kind.n / 2 + 16 + 4 * depth.masked_fill(absent, 0))).sum(1) * intervals.UNIT
    return (weight * value).sum(1), slack


def case(make: Maker, kind: Kind, name: str, dtype: str, form: str, rows: CompressRows, exact: bool = False) -> Case:
    """form: plain | rounded | packed."""
    tokens, packed, kept = len(rows.phase), form == "packed", DTYPES[dtype]
    both = make.normal(tokens, 2 * kind.channels + 4, scale=2)  # slices of one product, as the projections give them
    u, g = both[:, : kind.channels], both[:, kind.channels : 2 * kind.channels]
    ape, weight = make.normal(kind.ratio, kind.channels), make.normal(kind.width)
    slots = int(rows.write_to.max()) // kind.n + 1 if tokens else 1
    state = make.normal(slots, kind.n, 2 * kind.channels, scale=2)
    if exact:  # one small integer for all the tokens of a channel: sums are exact in any order
        whole = make.integers(-150, 151, kind.width).float().repeat(1 + kind.overlap)
        u, g, ape, weight = whole.expand(tokens, -1).contiguous(), torch.zeros_like(u), ape * 0, torch.ones_like(weight)
        state = torch.cat([whole, whole * 0]).expand(state.shape).contiguous()
    positions = rows.entry_positions.float().unsqueeze(-1) * (0.0 if exact else 1.0)
    angles = positions * 1e4 ** (-torch.arange(kind.dims // 2, device=make.device) / (kind.dims // 2))
    cis = torch.polar(torch.ones_like(angles), angles)
    width = kind.width
    if packed:
        width = kv.index_key_bytes(kind.width) if kind.index else kv.entry_bytes(kind.width, kind.dims)
    pool = make.integers(0, 100, PAGES, 64, width).to(torch.uint8 if packed else kept)

    def view(results: list[Tensor]) -> list[Tensor]:
        state, pool = results
        if not packed:
            return results
        if kind.index:
            return [state, kv.unpack_index_key(pool, kind.width)]
        end = kind.width + kind.dims + (kind.width - kind.dims) // 64
        return [state, kv.unpack_entry(pool, kind.width, kind.dims), pool[..., end:]]

    def tolerance(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
        allowed = torch.zeros_like(expected[1], dtype=torch.float64)
        done = rows.entry_to >= 0
        middle, slack = (x[done] for x in pooled(kind, u, g, ape, state, rows))
        made = intervals.rounded(intervals.spread(middle, slack), kept)
        made = intervals.rope(intervals.norm(made, weight, EPS, kept), cis[done], kept)
        if form != "plain":
            made = intervals.index_key(made, kept) if kind.index else intervals.entry(made, kind.dims)
        to = rows.entry_to[done]
        values = allowed.view(-1, kind.width)
        values[to] = intervals.tolerance(made, expected[1].reshape(-1, kind.width)[to])
        return [None, allowed, *([None] if packed and not kind.index else [])]

    how = {"eps": EPS, "dtype": kept, "index": kind.index, "quantize": form != "plain"}
    live = int((rows.entry_to >= 0).sum())
    moved = 2 * nbytes(u, g) + live * (kind.n * 8 * kind.width + width * pool.element_size()) + nbytes(rows.items)
    args = u, g, ape, weight, state, pool, rows, cis
    exact = exact and not (kind.index and dtype == "f32" and form == "rounded")  # its Hadamard sums need 31 bits
    label = f"{kind.name} {kind.ratio}, N {kind.width}, {name} {form}"
    return Case("compress", label, dtype, compress, compress_ref, args, bits if exact else tolerance, how,
                in_place=(4, 5), returns=False, view=view, moved=moved)  # fmt: skip


EDGES = [0, 3, 4, 7, 11, 15, 127, 128, 255, 383, 16511]


def _steps(make: Maker, kind: Kind, quick: bool) -> Iterator[tuple[str, CompressRows]]:
    yield "edges", decode_rows(kind, EDGES, 2, False, make)
    yield "edges, host's rows", decode_rows(kind, EDGES, 0, True, make)
    yield "one row, no entry", decode_rows(kind, [kind.ratio], 0, True, make)
    yield "no rows", decode_rows(kind, [], 0, False, make)
    yield "chunk", chunk_rows(kind, [(0, 300), (130, 3), (250, 9), (5, 1)], make)
    if not quick:
        yield "64 rows", decode_rows(kind, [128 * b + 127 - b % 2 for b in range(64)], 0, False, make)
        yield "1 row", decode_rows(kind, [65535], 0, False, make)
        yield "chunk of 4096", chunk_rows(kind, [(512, 4096)], make)


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    for dtype in DTYPES:
        for form in ("plain", "rounded", "packed") if dtype == "bf16" else ("plain", "rounded"):
            for kind in KINDS + (SMALL if form != "rounded" else []):
                if form == "plain" or kind.index or (kind.width - kind.dims) % 64 == 0:
                    for name, rows in _steps(make, kind, quick or kind in SMALL):
                        yield case(make, kind, name, dtype, form, rows)
            for kind in KINDS:
                yield case(make, kind, "exact sums", dtype, form, decode_rows(kind, EDGES, 1, False, make), exact=True)
                yield case(make, kind, "exact sums, chunk", dtype, form, chunk_rows(kind, [(0, 300)], make), exact=True)
