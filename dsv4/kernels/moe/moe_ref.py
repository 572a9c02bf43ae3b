"""Twin of moe."""

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.kernels.linear.operand import Dense
from dsv4.kernels.moe.operand import ExpertsOperand, TiledExperts
from dsv4.kernels.swiglu.swiglu_ref import activated_ref
from dsv4.quant.activations import treat


class Order(NamedTuple):
    """The (token, expert) pairs whose expert is held, in the order of their experts: pair numbers, tokens, and (expert
    by its place among those held, pairs) present.
    """

    pairs: Tensor
    tokens: Tensor
    groups: list[tuple[int, int]]


def order_of(ids: Tensor, held: range = range(2**63 - 1)) -> Order:
    expert, pairs = ids.flatten().sort(stable=True)
    here = (expert >= held.start) & (expert < held.stop)
    pairs = pairs[here]
    groups = list(Counter((expert[here] - held.start).tolist()).items())  # in rising order, as counted
    return Order(pairs, pairs // ids.shape[1], groups)


def _by_expert(x: Tensor, w: Dense | TiledExperts, groups: list[tuple[int, int]], dtype: torch.dtype) -> Tensor:
    """x [n, K] f32, rows sorted by their expert; w [E, N, K]; groups: (expert, rows) present -> [n, N] in dtype."""
    if not groups:
        return x.new_empty(0, w.values.shape[-2] if isinstance(w, Dense) else w.rows, dtype=dtype)
    parts, half = torch.split_with_sizes(x, [rows for _, rows in groups]), dtype == torch.bfloat16
    return torch.cat([w.matmul(p, e, half=half) for p, (e, _) in zip(parts, groups, strict=True)]).to(dtype)


def gate_up_ref(x: Tensor, operand: ExpertsOperand, order: Order, weights: Tensor, limit: float) -> Tensor:
    """The input of the second projection [n, F], before its treatment, of the n pairs in their order."""
    rows = treat(x, operand.in_treatment).index_select(0, order.tokens)
    gate, up = _by_expert(rows, operand.w13, order.groups, x.dtype).chunk(2, dim=-1)
    return activated_ref(gate, up, limit).mul_(weights.flatten()[order.pairs].unsqueeze(-1)).to(x.dtype)


def down_ref(mid: Tensor, operand: ExpertsOperand, order: Order, shared: Tensor) -> Tensor:
    """mid [n.., F]: rows beyond those of the n pairs are not looked at."""
    mid = mid[: len(order.pairs)]
    down = _by_expert(treat(mid, operand.mid_treatment), operand.down, order.groups, mid.dtype).float()
    routed = torch.zeros_like(shared, dtype=torch.float32).index_add_(0, order.tokens, down)  # experts in their order
    return routed.add_(shared).to(shared.dtype)


def moe_ref(
    x: Tensor, operand: ExpertsOperand, ids: Tensor, weights: Tensor, shared: Tensor, *, limit: float
) -> Tensor:
    order = order_of(ids, operand.held)
    return down_ref(gate_up_ref(x, operand, order, weights, limit), operand, order, shared)
