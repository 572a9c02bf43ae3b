"""index_topk against brute force: visibility, ties, -1 padding, several sequences."""

import torch

from dsv4.kernels.index_topk.index_topk import index_topk


def brute(q, w, keys, rows, limit, topk):
    scores = [(-float((w * torch.relu(keys[r] @ q.T)).sum()), e) for e, r in enumerate(rows[:limit].tolist())]
    return {int(rows[e]) for _, e in sorted(scores)[:topk]}


def test_equals_brute_force_over_two_sequences():
    g = torch.Generator().manual_seed(5)
    q, w = torch.randn(6, 64, 128, generator=g), torch.randn(6, 64, generator=g)  # Flash: 64 heads of 128
    keys = torch.randn(3, 64, 128, generator=g)
    entries = torch.stack([torch.randperm(192, generator=g)[:90] for _ in range(2)])
    entries[1, 40:] = -1
    visible = torch.tensor([0, 3, 88, 90, 39, 40])
    got = index_topk(q, w, keys, entries, visible, [(0, 4), (4, 6)], 16)
    assert got.shape == (6, 16)
    for t in range(6):
        expected = brute(q[t], w[t], keys.view(-1, 128), entries[0 if t < 4 else 1], int(visible[t]), 16)
        assert set(got[t].tolist()) - {-1} == expected
        assert (got[t] == -1).sum() == 16 - len(expected)


def test_equal_scores_keep_the_lower_entry():
    q, w = torch.ones(1, 2, 32), torch.ones(1, 2)
    keys = torch.ones(1, 64, 32)
    entries = torch.arange(10, 30).unsqueeze(0)
    assert index_topk(q, w, keys, entries, torch.tensor([20]), [(0, 1)], 4).tolist() == [[10, 11, 12, 13]]


def test_torch_ties_are_those_of_torch_topk():
    scores = torch.randint(0, 3, (6, 40), generator=torch.Generator().manual_seed(2)).float()
    q, w, keys = torch.ones(6, 1, 1), torch.ones(6, 1), torch.zeros(6, 64, 1)
    for t in range(6):  # one sequence per row, so that each row has keys of its own
        keys[t, :40, 0] = scores[t]
    entries = torch.arange(6).unsqueeze(1) * 64 + torch.arange(40)
    spans = [(t, t + 1) for t in range(6)]
    got = index_topk(q, w, keys, entries, torch.full((6,), 40), spans, 16, True)
    expected = torch.cat([entries[t][scores[t : t + 1].topk(16, dim=-1).indices] for t in range(6)])
    assert torch.equal(got, expected)


def test_negative_head_weights_count():
    q, w = torch.tensor([[[1.0], [1.0]]]), torch.tensor([[1.0, -3.0]])
    keys = torch.tensor([1.0, 2.0, 3.0, -1.0]).view(1, 4, 1)
    assert index_topk(q, w, keys, torch.arange(4).unsqueeze(0), torch.tensor([4]), [(0, 1)], 2).tolist() == [[3, 0]]


def test_nan_in_a_hidden_entry_does_not_leak():
    keys = torch.zeros(1, 4, 8)
    keys[0, 3] = float("nan")
    got = index_topk(
        torch.ones(1, 1, 8), torch.ones(1, 1), keys, torch.arange(4).unsqueeze(0), torch.tensor([3]), [(0, 1)], 4
    )
    assert got.tolist() == [[0, 1, 2, -1]]
