"""moe against one expert at a time in float64, per stored format and activation mode."""

import pytest
import torch

from dsv4.kernels.moe.moe import moe
from dsv4.kernels.moe.operand import experts_operand
from dsv4.quant.activations import treat, treatment
from dsv4.quant.weights import FP8Weight, MXFP4Weight, NVFP4Weight, PlainWeight

FORMATS = {"nvfp4": NVFP4Weight.quantize, "mxfp4": MXFP4Weight.quantize, "fp8": FP8Weight.quantize, "f32": PlainWeight}


def case(format, experts=8, hidden=256, inner=128, rows=5, topk=3):
    g = torch.Generator().manual_seed(1)
    w1, w3 = (FORMATS[format](torch.randn(experts, inner, hidden, generator=g) * 0.3) for _ in range(2))
    w2 = FORMATS[format](torch.randn(experts, hidden, inner, generator=g) * 0.1)
    x, shared = torch.randn(rows, hidden, generator=g), torch.randn(rows, hidden, generator=g)
    ids = torch.stack([torch.randperm(experts, generator=g)[:topk] for _ in range(rows)])
    return (w1, w2, w3), x, ids, torch.rand(rows, topk, generator=g), shared


def by_definition(w, x, ids, weights, shared, limit, how):
    w1, w2, w3 = (one.dequantize(torch.float64) for one in w)
    rows = treat(x, how).double()
    out = shared.double().clone()
    for t in range(len(x)):
        for k, e in enumerate(ids[t].tolist()):
            gate, up = (w1[e] @ rows[t]).clamp(max=limit), (w3[e] @ rows[t]).clamp(-limit, limit)
            a = (gate * torch.sigmoid(gate) * up * weights[t, k].double()).to(x.dtype)
            out[t] += w2[e] @ treat(a.unsqueeze(0), how)[0].double()
    return out


@pytest.mark.parametrize("act", ["bf16", "fp8", "nvfp4"])
@pytest.mark.parametrize("format", list(FORMATS))
def test_equals_one_expert_at_a_time(format, act):
    w, x, ids, weights, shared = case(format)
    got = moe(x, experts_operand(*w, act=act), ids, weights, shared, limit=10.0)
    true = by_definition(w, x, ids, weights, shared, 10.0, treatment(format, act))
    assert (got.double() - true).abs().max() < 5e-5 * true.abs().max()


def test_clamp_bites_before_silu():
    w, x, ids, weights, shared = case("f32")
    op = experts_operand(*w, act="bf16")
    x = x * 20
    clamped, free = (moe(x, op, ids, weights, shared, limit=limit) for limit in (10.0, 0.0))
    assert (clamped.double() - by_definition(w, x, ids, weights, shared, 10.0, "none")).abs().max() < 1e-3
    assert (clamped - free).abs().max() > 1


def test_rows_do_not_depend_on_their_batch():
    w, x, ids, weights, shared = case("nvfp4")
    op = experts_operand(*w, act="bf16")
    whole = moe(x, op, ids, weights, shared, limit=10.0)
    for t in range(len(x)):
        row = slice(t, t + 1)
        alone = moe(x[row], op, ids[row], weights[row], shared[row], limit=10.0)
        assert (alone - whole[row]).abs().max() < 2e-6 * whole.abs().max()  # float32 sums of another order


@pytest.mark.parametrize("format", list(FORMATS))
def test_parts_of_the_experts_give_parts_of_the_sum(format):
    w, x, ids, weights, shared = case(format)
    ids[0, 1] = ids[3] = -1  # no expert: as if it had no weight
    parts = []
    for held in (range(3), range(3, 8)):
        some = (type(one)(**{n: t[held.start : held.stop] for n, t in one.tensors().items()}) for one in w)
        operand = experts_operand(*some, act="bf16", first=held.start)
        assert operand.held == held
        parts.append(moe(x, operand, ids, weights, torch.zeros_like(shared), limit=10.0))
    assert not parts[0][3].any() and not parts[1][3].any()
    true = by_definition(w, x, ids.clamp(min=0), weights * (ids >= 0), shared, 10.0, "none")
    assert (sum(parts).double() + shared - true).abs().max() < 5e-5 * true.abs().max()
    nobody = moe(x[3:4], operand, ids[3:4], weights[3:4], shared[3:4], limit=10.0)
    assert torch.equal(nobody, shared[3:4])
