"""Twin of moe."""

from collections import Counter

import torch
from torch import Tensor

from dsv4.kernels.linear.operand import Dense
from dsv4.kernels.moe.operand import ExpertsOperand
from dsv4.kernels.swiglu.swiglu_ref import swiglu_ref
from dsv4.quant.activations import treat


def _by_expert(x: Tensor, w: Dense, groups: list[tuple[int, int]]) -> Tensor:
    """x [n, K] f32, rows sorted by their expert; w [E, N, K]; groups: (expert, rows) present -> [n, N] f32."""
    parts = torch.split_with_sizes(x, [rows for _, rows in groups])
    return torch.cat([w.matmul(p, e) for p, (e, _) in zip(parts, groups, strict=True)])


def moe_ref(
    x: Tensor, operand: ExpertsOperand, ids: Tensor, weights: Tensor, shared: Tensor, *, limit: float
) -> Tensor:
    expert, order = ids.flatten().sort(stable=True)
    groups = list(Counter(expert.tolist()).items())  # in rising order, as counted
    token = order // ids.shape[1]
    rows = treat(x, operand.in_treatment).index_select(0, token)
    gate, up = _by_expert(rows, operand.w13, groups).to(x.dtype).chunk(2, dim=-1)
    a = swiglu_ref(gate, up, limit).mul_(weights.flatten()[order].unsqueeze(-1)).to(x.dtype)
    down = _by_expert(treat(a, operand.mid_treatment), operand.down, groups).to(x.dtype).float()
    routed = torch.zeros_like(x, dtype=torch.float32).index_add_(0, token, down)  # in the order of the experts
    return routed.add_(shared).to(x.dtype)
