"""compress against SPEC 2.6 written token by token in float64: CSA overlap, HCA, chunked arrival, state reset."""

import pytest
import torch

from dsv4.kernels.compress.compress import compress
from dsv4.kvcache import rows_chunk, rows_decode
from dsv4.kvcache.layout import state_tokens
from dsv4.kvcache.pages import PageTable
from dsv4.kvcache.rows import Segment

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
