"""index_topk against brute force: visibility, ties, order, -1 padding, several sequences."""

import pytest
import torch

from dsv4.kernels.index_query.index_query import index_query
from dsv4.kernels.index_topk import index_topk as op

PAGE = torch.zeros(1, 1, dtype=torch.int64)


def index_topk(q, *rest):
    """Queries taken as they are: not turned, not quantised."""
    identity = torch.ones(len(q), q.shape[-1] // 2, dtype=torch.complex64)
    return op.index_topk(q, identity, *rest, quantize=False)


def brute(q, w, keys, rows, limit, topk):
    """Entry numbers by falling score, the lower first among equals."""
    scores = [(-float((w * torch.relu(keys[r] @ q.T)).sum()), e) for e, r in enumerate(rows[:limit])]
    return [e for _, e in sorted(scores)[:topk]]


def ones(*shape):
    return torch.ones(shape)


@pytest.mark.parametrize("order", ["entry", "score", "torch"])
def test_equals_brute_force_over_two_sequences(order):
    g = torch.Generator().manual_seed(5)
    q, w = torch.randn(7, 64, 128, generator=g), torch.randn(7, 64, generator=g)  # Flash: 64 heads of 128
    keys = torch.randn(4, 64, 128, generator=g)
    pages = torch.tensor([[2, 0], [3, -1]])
    sequence = torch.tensor([0, 0, 0, 0, 1, 1, -1])
    visible = torch.tensor([0, 3, 88, 128, 39, 64, 0])
    got = index_topk(q, w, keys, pages, sequence, visible, 16, order)
    assert got.shape == (7, 16)
    for t in range(7):
        b = int(sequence[t])
        rows = [int(pages[b, e // 64]) * 64 + e % 64 for e in range(int(visible[t]))]
        expected = brute(q[t], w[t], keys.view(-1, 128), rows, int(visible[t]), 16)
        expected = [rows[e] for e in (sorted(expected) if order == "entry" else expected)]
        assert got[t].tolist() == expected + [-1] * (16 - len(expected))


def test_equal_scores_keep_the_lower_entry():
    q, w, keys = ones(1, 2, 32), ones(1, 2), ones(3, 64, 32)
    keys[2, :10] = 0.5
    for order in ("entry", "score"):
        got = index_topk(q, w, keys, torch.tensor([[2]]), PAGE[0], torch.tensor([20]), 4, order)
        assert got.tolist() == [[138, 139, 140, 141]]


def test_torch_ties_are_those_of_torch_topk():
    scores = torch.randint(0, 3, (6, 40), generator=torch.Generator().manual_seed(2)).float()
    q, w, keys = ones(6, 1, 2), ones(6, 1), torch.zeros(6, 64, 2)
    for t in range(6):  # one sequence per row, so that each row has keys of its own
        keys[t, :40, 0] = scores[t]
    every = torch.arange(6)
    got = index_topk(q, w, keys, every.unsqueeze(1), every, torch.full((6,), 40), 16, "torch")
    expected = torch.cat([t * 64 + scores[t : t + 1].topk(16, dim=-1).indices for t in range(6)])
    assert torch.equal(got, expected)


def test_negative_head_weights_count():
    q, w = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]), torch.tensor([[1.0, -3.0]])
    keys = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [-1.0, 0.0]]).unsqueeze(0)
    assert index_topk(q, w, keys, PAGE, PAGE[0], torch.tensor([4]), 2, "score").tolist() == [[3, 0]]


def test_nothing_hidden_leaks():
    """NaN behind the last visible entry, in pages nobody holds and in the rows of a padding row."""
    keys = torch.zeros(3, 4, 8)
    keys[1, 3], keys[0], keys[2] = float("nan"), float("nan"), float("nan")
    q = ones(2, 1, 8)
    q[1] = float("nan")
    got = index_topk(q, ones(2, 1), keys, torch.tensor([[1, -1]]), torch.tensor([0, -1]), torch.tensor([3, 4]), 4)
    assert got.tolist() == [[4, 5, 6, -1], [-1, -1, -1, -1]]


def test_width_follows_from_pages_alone():
    for visible in (0, 1, 64):
        got = index_topk(ones(1, 1, 8), ones(1, 1), ones(9, 64, 8), PAGE, PAGE[0], torch.tensor([visible]), 512)
        assert got.tolist() == [[*range(visible), *[-1] * (64 - visible)]]


def test_queries_are_turned_and_quantised():
    g = torch.Generator().manual_seed(7)
    q, w, keys = (
        torch.randn(3, 8, 128, generator=g),
        torch.randn(3, 8, generator=g),
        torch.randn(2, 64, 128, generator=g),
    )
    cis = torch.polar(ones(3, 32), torch.randn(3, 32, generator=g))
    rest = w, keys, torch.tensor([[1, 0]]), torch.zeros(3, dtype=torch.int64), torch.tensor([100, 120, 128]), 16
    for quantize in (True, False):
        treated = index_query(q, cis, quantize=quantize)
        assert torch.equal(op.index_topk(q, cis, *rest, quantize=quantize), index_topk(treated, *rest))
    assert not torch.equal(op.index_topk(q, cis, *rest, quantize=True), index_topk(q, *rest))
