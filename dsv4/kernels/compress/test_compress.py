"""compress against SPEC 2.6 written token by token in float64: CSA overlap, HCA, chunked arrival, state reset."""

import pytest
import torch

from dsv4.kernels.compress.compress import compress
from dsv4.kernels.compress.rows import CompressRows
from dsv4.kvcache import rows_chunk, rows_decode
from dsv4.kvcache.layout import state_tokens
from dsv4.kvcache.pages import PageTable
from dsv4.kvcache.rows import Segment
from dsv4.quant import kv

WIDTH, EPS = 96, 1e-6
FREQS = torch.logspace(0, -2, 8)


def cis_at(positions):
    angle = torch.outer(positions.float(), FREQS)
    return torch.polar(torch.ones_like(angle), angle)


def entry_by_definition(u, g, ape, weight, i, ratio, overlap):
    items = []
    for t in range(ratio * (i - 1) if overlap else ratio * i, ratio * (i + 1)):
        if t < 0:
            continue
        half = slice(None) if not overlap else slice(0, WIDTH) if t < ratio * i else slice(WIDTH, None)
        items.append(((g[t] + ape[t % ratio]).double()[half], u[t].double()[half]))
    p = torch.softmax(torch.stack([score for score, _ in items]), dim=0)
    pooled = (p * torch.stack([value for _, value in items])).sum(0)
    x = pooled / (pooled.square().mean() + EPS).sqrt() * weight.double()
    pairs = torch.view_as_complex(x[-16:].view(-1, 2).contiguous()) * cis_at(torch.tensor([ratio * i]))[0].to(
        torch.complex128
    )
    return torch.cat([x[:-16], torch.view_as_real(pairs).flatten()])


def run(u, g, ape, weight, kind, chunks, slot=1):
    ratio, n = kind[1], state_tokens(*kind)
    table = PageTable(ratio, 8, 3)
    state = torch.full((3, n, 2 * u.shape[1]), float("nan"))  # poison: what the last sequence left behind
    pool = torch.full((8, 64, WIDTH), float("nan"))
    start = 0
    for length in chunks:
        table.grow(slot, start + length)
        positions = torch.arange(start, start + length)
        plan = rows_decode if length == 1 else rows_chunk
        rows = plan.compress_rows([Segment(slot, start, length, 0)], positions, table, kind)
        compress(
            u[start : start + length], g[start : start + length], ape, weight, state, pool, rows,
            cis_at(rows.entry_positions), eps=EPS, dtype=torch.float32, index=False, quantize=False,
        )  # fmt: skip
        start += length
    return pool.view(-1, WIDTH)[table.rows(slot, 0, start // ratio)]


@pytest.mark.parametrize("kind", [("csa", 4), ("hca", 128), ("hca", 16), ("csa", 3)])
@pytest.mark.parametrize("chunks", ["whole", "ones", "mixed"])
def test_equals_the_definition_however_tokens_arrive(kind, chunks):
    total, overlap = 301, kind[0] == "csa"
    gen = torch.Generator().manual_seed(kind[1])
    channels = 2 * WIDTH if overlap else WIDTH
    u, g = torch.randn(total, channels, generator=gen), torch.randn(total, channels, generator=gen) * 2
    ape, weight = torch.randn(kind[1], channels, generator=gen), torch.rand(WIDTH, generator=gen) + 0.5
    sizes = {"whole": [total], "ones": [1] * total, "mixed": [1, 2, 127, 1, 130, 3, 5, 32]}[chunks]
    got = run(u, g, ape, weight, kind, sizes)
    assert len(got) == total // kind[1]
    for i in range(len(got)):
        true = entry_by_definition(u, g, ape, weight, i, kind[1], overlap)
        assert (got[i].double() - true).abs().max() < 2e-5, i


@pytest.mark.parametrize("index", [False, True])
def test_rows_of_minus_one_are_inert_and_packed_is_the_same(index):
    """A decode step of three sequences: one completes an entry, one does not, one row is padding with poisoned rows."""
    gen = torch.Generator().manual_seed(9)
    width, n, ratio = 128 if index else 144, 8, 4
    u, g = torch.randn(3, 2 * width, generator=gen), torch.randn(3, 2 * width, generator=gen)
    ape, weight = torch.randn(ratio, 2 * width, generator=gen), torch.ones(width)
    u[2] = float("nan")
    rows = CompressRows(
        phase=torch.tensor([3, 1, 0]), write_rows=torch.arange(3), write_to=torch.tensor([7, 8 + 1, -1]),
        from_state=True, history=torch.empty(0, dtype=torch.int64),
        items=torch.stack([torch.arange(8), torch.full((8,), -1), torch.full((8,), -1)]),
        entry_positions=torch.tensor([4, 0, 0]), entry_to=torch.tensor([70, -1, -1]),
    )  # fmt: skip
    size = kv.index_key_bytes(width) if index else kv.entry_bytes(width, 16)
    results = []
    for like in (torch.full((2, 64, width), 7.0).bfloat16(), torch.full((2, 64, size), 99, dtype=torch.uint8)):
        state = torch.randn(3, n, 4 * width, generator=torch.Generator().manual_seed(1))
        state[2] = float("nan")
        before = state.clone()
        how = {"eps": EPS, "dtype": torch.bfloat16, "index": index, "quantize": True}
        compress(u, g, ape, weight, state, like, rows, cis_at(rows.entry_positions), **how)
        assert torch.equal(state[0, 7], torch.cat([u[0], g[0] + ape[3]])) and torch.equal(state[0, :7], before[0, :7])
        assert torch.equal(state[1, 1], torch.cat([u[1], g[1] + ape[1]])) and state[2].isnan().all()
        flat = like.view(128, -1)
        untouched = torch.cat([flat[:70], flat[71:]])
        assert (untouched == (99 if like.dtype == torch.uint8 else 7)).all()
        results.append(flat[70])
    read = kv.unpack_index_key(results[1], width) if index else kv.unpack_entry(results[1], width, 16)
    assert torch.equal(read, results[0]) and read.isfinite().all()
