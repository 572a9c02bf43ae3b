"""attn_inputs against its ops one by one: results, ring, states and pools, in decode steps and in chunks."""

import pytest
import torch

from dsv4.kernels.attn_inputs import cases
from dsv4.kernels.attn_inputs.attn_inputs import attn_inputs
from dsv4.kernels.case import EPS, Maker
from dsv4.kernels.compress.cases import EDGES, KINDS, chunk_rows, decode_rows

MAKE = Maker(torch.device("cpu"))


def steps(kind):
    yield decode_rows(kind, EDGES, 2, False, MAKE)
    yield decode_rows(kind, EDGES, 0, True, MAKE)
    yield chunk_rows(kind, [(0, 300), (130, 3)], MAKE)


@pytest.mark.parametrize("form", ["plain", "packed"])
@pytest.mark.parametrize("kinds", [[], KINDS[1:2], [KINDS[0], KINDS[2]]], ids=["window", "hca", "csa"])
def test_each_result_is_that_of_its_op(kinds, form):
    for rows in zip(*(steps(kind) for kind in kinds), strict=True) if kinds else [()]:
        made = cases.case(MAKE, "", kinds, list(rows), "bf16", form)
        held = [[x.clone() for x in made.args] for _ in range(2)]
        results = [op(*args, **made.kwargs) for op, args in zip((made.run, made.twin), held, strict=True)]
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        for place, (a, b) in enumerate(zip(*held, strict=True)):
            assert torch.equal(a, b)
            assert (place in made.in_place) != torch.equal(a, made.args[place])


def test_a_row_that_is_written_nowhere_leaves_the_ring():
    qr, kv, ring = torch.randn(2, 8).bfloat16(), torch.randn(2, 80).bfloat16(), torch.zeros(1, 4, 80).bfloat16()
    cis, to = MAKE.cis(2, 16), torch.tensor([-1, 2])
    normed, entry = attn_inputs(
        qr, torch.ones(8), kv, torch.ones(80), cis, ring, torch.arange(2), to, [], eps=EPS, quantize=False
    )
    assert torch.equal(ring[0, 2], entry[1]) and not ring[0, [0, 1, 3]].any()
    square = qr.double().square().mean(1, keepdim=True)
    assert (normed.double() - qr.double() / (square + EPS).sqrt()).abs().max() < 2**-6
