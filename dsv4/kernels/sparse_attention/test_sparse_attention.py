"""sparse_attention against float64: window, selection, sink, un-rotation, hidden rows."""

import pytest
import torch

from dsv4.kernels.q_norm_rope.q_norm_rope import q_norm_rope
from dsv4.kernels.sparse_attention.sparse_attention import sparse_attention
from dsv4.quant.kv import pack_entry, unpack_entry


def case(rows, heads, width, local_n, pool_n, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, heads, width, generator=g) * 2
    local, pool = torch.randn(200, width, generator=g), torch.randn(4, 64, width, generator=g)
    local_rows = torch.randint(-1, 200, (rows, local_n), generator=g)
    pool_rows = torch.randint(-1, 256, (rows, pool_n), generator=g)
    sink = torch.randn(heads, generator=g) * 3
    angle = torch.outer(torch.arange(float(rows)), torch.logspace(0, -2, 32))
    return q, local, local_rows, pool, pool_rows, sink, torch.polar(torch.ones_like(angle), angle)


def truth(q, local, local_rows, pool, pool_rows, sink, cis, scale):
    out = []
    for t in range(len(q)):
        rows = [local[r] for r in local_rows[t].tolist() if r >= 0]
        rows += [pool.view(-1, q.shape[-1])[r] for r in pool_rows[t].tolist() if r >= 0]
        kv = torch.stack(rows).double() if rows else torch.zeros(0, q.shape[-1], dtype=torch.float64)
        logits = torch.cat([q[t].double() @ kv.T * scale, sink.double().unsqueeze(1)], dim=1)
        o = torch.softmax(logits, dim=1)[:, :-1] @ kv
        pairs = torch.view_as_complex(o[:, -64:].unflatten(-1, (-1, 2)).contiguous()) * cis[t].to(torch.complex128)
        out.append(torch.cat([o[:, :-64], torch.view_as_real(pairs).flatten(-2)], dim=1))
    return torch.stack(out)


@pytest.mark.parametrize(
    ("rows", "heads", "local_n", "pool_n"), [(3, 64, 128, 512), (130, 2, 24, 7), (1, 128, 128, 32), (2, 4, 5, 0)]
)
def test_equals_float64(rows, heads, local_n, pool_n):
    args = case(rows, heads, 512 if rows < 100 else 128, local_n, pool_n)
    got = sparse_attention(*args, scale=512**-0.5)
    assert (got.double() - truth(*args, 512**-0.5)).abs().max() < 1e-5


def test_bfloat16_rounds_only_probabilities_and_result():
    q, local, local_rows, pool, pool_rows, sink, cis = case(2, 8, 512, 64, 64)
    args = (q.bfloat16(), local.bfloat16(), local_rows, pool.bfloat16(), pool_rows, sink, cis)
    got = sparse_attention(*args, scale=512**-0.5)
    true = truth(*args, 512**-0.5)
    # 2^-8 relative on each probability and on the result, on values bounded by the largest entry.
    assert (got.double() - true).abs().max() < 2 * 2**-8 * local.abs().max()


def test_nothing_visible_is_zero_and_hidden_nan_does_not_leak():
    q, local, local_rows, pool, pool_rows, sink, cis = case(2, 4, 128, 8, 8)
    local[0], pool.view(-1, 128)[0] = float("nan"), float("nan")  # row 0 is what a careless gather of -1 would read
    local_rows, pool_rows = torch.full_like(local_rows, -1), torch.full_like(pool_rows, -1)
    assert (sparse_attention(q, local, local_rows, pool, pool_rows, sink, cis, scale=0.1) == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_entries_count_as_what_they_hold(dtype):
    q, local, local_rows, pool, pool_rows, sink, cis = case(11, 4, 512, 24, 40)
    packed = pack_entry(local.bfloat16(), 64), pack_entry(pool.bfloat16(), 64)
    plain = [unpack_entry(x, 512, 64, dtype) for x in packed]
    rest = local_rows, pool_rows, sink, cis
    got = sparse_attention(q.to(dtype), packed[0], rest[0], packed[1], *rest[1:], scale=0.05)
    assert torch.equal(got, sparse_attention(q.to(dtype), plain[0], rest[0], plain[1], *rest[1:], scale=0.05))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_queries_may_come_as_the_projection_leaves_them(dtype):
    q, local, *rest, cis = case(11, 4, 512, 24, 40)
    q, held, turn = q.to(dtype), (local.to(dtype), *rest), cis.conj_physical()
    got = sparse_attention(q, *held, cis, scale=0.05, turn=turn, eps=1e-6)
    assert torch.equal(got, sparse_attention(q_norm_rope(q, turn, 1e-6), *held, cis, scale=0.05))
    assert not torch.equal(got, sparse_attention(q, *held, cis, scale=0.05))
