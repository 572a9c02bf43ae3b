"""Twin of index_topk."""

from collections.abc import Sequence

import torch
from torch import Tensor


def index_scores_ref(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """sum_h w_h relu(q_h . k_e), each step rounded to q's dtype -> [T, E]."""
    dots = torch.matmul(q.flatten(0, 1), keys.T).relu_().unflatten(0, q.shape[:2])
    return (dots * weights.unsqueeze(-1)).sum(1)


def index_topk_ref(
    q: Tensor,
    weights: Tensor,
    keys: Tensor,
    entries: Tensor,
    visible: Tensor,
    segments: Sequence[tuple[int, int]],
    topk: int,
    torch_ties: bool = False,
) -> Tensor:
    flat = keys.view(-1, keys.shape[-1])
    picked = []
    for sequence, (first, last) in enumerate(segments):
        limit = visible[first:last].unsqueeze(-1)
        rows = entries[sequence]
        number = torch.arange(len(rows), device=q.device)
        scores = index_scores_ref(q[first:last], weights[first:last], flat[rows.clamp(min=0)])
        scores = scores.masked_fill(number >= limit, float("-inf"))
        if torch_ties:
            best = scores.topk(min(topk, len(rows)), dim=-1).indices
        else:
            best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :topk]
        picked.append(rows[best].masked_fill(best >= limit, -1))
    return torch.cat(picked)
