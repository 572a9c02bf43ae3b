"""Twin of moe."""

import torch
from torch import Tensor

from dsv4.kernels.linear.operand import treat
from dsv4.kernels.moe.operand import ExpertsOperand
from dsv4.kernels.swiglu.swiglu_ref import swiglu_ref


def _expert_matmul(x: Tensor, w: Tensor, counts: list[int]) -> Tensor:
    parts = x.split(counts)
    return torch.cat([torch.nn.functional.linear(part, w[e]) for e, part in enumerate(parts) if len(part)])


def moe_ref(x: Tensor, operand: ExpertsOperand, ids: Tensor, weights: Tensor, shared: Tensor, *, limit: float) -> Tensor:
    topk = ids.shape[1]
    order = ids.flatten().sort(stable=True).indices
    counts = torch.bincount(ids.flatten(), minlength=operand.w13.shape[0]).tolist()
    rows = treat(x, operand.in_treatment)[order // topk]
    gate_up = _expert_matmul(rows, operand.w13, counts).to(x.dtype)
    a = (swiglu_ref(*gate_up.chunk(2, dim=-1), limit) * weights.flatten()[order].unsqueeze(-1)).to(x.dtype)
    down = _expert_matmul(treat(a, operand.mid_treatment), operand.w2_dense, counts).to(x.dtype).float()
    routed = torch.empty_like(down).index_copy_(0, order, down).unflatten(0, (-1, topk)).sum(1)
    return (routed + shared.float()).to(x.dtype)
