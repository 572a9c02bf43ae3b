"""router against a scalar walk: bias selects but never weighs, hash layers use learned scores, ties go to the lower
expert.
"""

import math

import pytest
import torch

from dsv4.kernels.router.router import router


@pytest.mark.parametrize(("experts", "topk", "scale"), [(256, 6, 1.5), (384, 6, 2.5), (7, 3, 1.5)])  # Flash, Pro, tiny
def test_score_routing(experts, topk, scale):
    g = torch.Generator().manual_seed(experts)
    logits, bias = torch.randn(20, experts, generator=g) * 10, torch.randn(experts, generator=g)
    ids, weights = router(logits, bias, None, torch.zeros(20, dtype=torch.int64), topk=topk, route_scale=scale)
    for t in range(20):
        s = [math.sqrt(x if x > 20 else math.log1p(math.exp(x))) for x in logits[t].tolist()]
        best = sorted(range(experts), key=lambda e: (-(s[e] + float(bias[e])), e))[:topk]
        assert ids[t].tolist() == best
        total = sum(s[e] for e in best)
        for k, e in enumerate(best):
            assert math.isclose(float(weights[t, k]), s[e] / total * scale, rel_tol=1e-5)


def test_hash_routing_takes_the_table_and_weighs_by_score():
    table = torch.tensor([[3, 1], [0, 2], [2, 3]])
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]])
    ids, weights = router(logits, None, table, torch.tensor([2, 0]), topk=2, route_scale=1.0)
    assert ids.tolist() == [[2, 3], [3, 1]]
    s = lambda x: math.sqrt(math.log1p(math.exp(x)))  # noqa: E731
    assert math.isclose(float(weights[0, 0]), s(2) / (s(2) + s(3)), rel_tol=1e-6)
    assert math.isclose(float(weights[1, 1]), s(2) / (s(0) + s(2)), rel_tol=1e-6)


def test_ties_go_to_the_lower_expert():
    ids, _ = router(torch.zeros(1, 8), torch.zeros(8), None, torch.zeros(1, dtype=torch.int64), topk=3, route_scale=1.0)
    assert ids.tolist() == [[0, 1, 2]]
