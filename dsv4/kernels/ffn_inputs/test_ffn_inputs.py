"""ffn_inputs against its two ops, and a pair of each by hand."""

import math

import pytest
import torch

from dsv4.kernels.ffn_inputs.ffn_inputs import ffn_inputs
from dsv4.kernels.router.router import router
from dsv4.kernels.swiglu.swiglu import swiglu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hashed", [False, True])
def test_each_result_is_that_of_its_op(hashed, dtype):
    g = torch.Generator().manual_seed(1)
    logits, halves = torch.randn(9, 16, generator=g), torch.randn(9, 2, 40, generator=g).to(dtype) * 8
    bias = None if hashed else torch.randn(16, generator=g)
    table = torch.randint(16, (30, 3), generator=g) if hashed else None
    tokens, how = torch.arange(9) * 3, {"topk": 3, "route_scale": 1.5}
    found = ffn_inputs(logits, halves[:, 0], halves[:, 1], bias, table, tokens, limit=10.0, **how)
    expected = *router(logits, bias, table, tokens, **how), swiglu(halves[:, 0], halves[:, 1], 10.0)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_by_hand():
    logits, gate, up = torch.tensor([[0.0, 30.0]]), torch.tensor([[12.0]]), torch.tensor([[-12.0]])
    ids, weights, x = ffn_inputs(logits, gate, up, None, None, torch.zeros(1).long(), topk=2, route_scale=1.0, limit=10)
    a, b = math.sqrt(math.log(2)), math.sqrt(30)
    assert ids.tolist() == [[1, 0]] and weights[0].tolist() == pytest.approx([b / (a + b), a / (a + b)])
    assert float(x) == pytest.approx(10 / (1 + math.exp(-10)) * -10)
