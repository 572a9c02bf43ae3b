"""Twin of index_topk."""

import torch
from torch import Tensor

from dsv4.kernels.index_query.index_query_ref import index_query_ref
from dsv4.quant.kv import unpack_index_key


def index_scores_ref(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """sum_h w_h relu(q_h . k_e), each step rounded to q's dtype -> [T, E]."""
    dots = torch.matmul(q.flatten(0, 1), keys.T).relu_().unflatten(0, q.shape[:2])
    return (dots * weights.unsqueeze(-1)).sum(1)


def _keys_of(keys: Tensor, pages: Tensor, count: int, like: Tensor) -> Tensor:
    """The first `count` keys [count, Ci] of a sequence, in the dtype of `like` [T, Hi, Ci]."""
    held = keys.index_select(0, pages[: -(-count // keys.shape[1])].clamp(min=0)).flatten(0, 1)[:count]
    if held.dtype == torch.uint8:
        return unpack_index_key(held, like.shape[-1], like.dtype)
    return held


def _best(scores: Tensor, topk: int, order: str) -> Tensor:
    if order == "torch":
        return scores.topk(min(topk, scores.shape[1]), dim=-1).indices
    best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :topk]
    return best.sort(dim=-1).values if order == "entry" else best


def index_topk_ref(
    q: Tensor,
    cis: Tensor,
    weights: Tensor,
    keys: Tensor,
    pages: Tensor,
    sequence: Tensor,
    visible: Tensor,
    topk: int,
    order: str = "entry",
    weight_scale: float = 1.0,
    *,
    quantize: bool,
) -> Tensor:
    q = index_query_ref(q, cis, quantize=quantize)
    weights = weights.to(q.dtype) * weight_scale
    page = keys.shape[1]
    out = torch.full((len(q), min(topk, page * pages.shape[1])), -1, device=q.device)
    runs, lengths = sequence.unique_consecutive(return_counts=True)
    first = 0
    for b, length in zip(runs.tolist(), lengths.tolist(), strict=True):
        rows = slice(first, first + length)
        first += length
        limit = visible[rows].unsqueeze(-1)
        most = int(limit.max())
        if b < 0 or most == 0:
            continue
        scores = index_scores_ref(q[rows], weights[rows], _keys_of(keys, pages[b], most, q))
        scores = scores.masked_fill(torch.arange(most, device=q.device) >= limit, float("-inf"))
        best = _best(scores, topk, order)
        out[rows, : best.shape[1]] = (pages[b][best // page] * page + best % page).masked_fill(best >= limit, -1)
    return out
