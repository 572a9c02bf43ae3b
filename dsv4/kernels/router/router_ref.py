"""Twin of router."""

import torch
from torch import Tensor

from dsv4.quant.scalars import scalar


def router_ref(
    logits: Tensor, bias: Tensor | None, tid2eid: Tensor | None, tokens: Tensor, *, topk: int, route_scale: float
) -> tuple[Tensor, Tensor]:
    scores = torch.nn.functional.softplus(logits).sqrt()
    if tid2eid is not None:
        ids = tid2eid[tokens]
    else:
        biased = scores if bias is None else scores + bias
        ids = biased.sort(dim=-1, descending=True, stable=True).indices[:, :topk]
    picked = scores.gather(1, ids)
    return ids, picked / picked.sum(-1, keepdim=True) * scalar(route_scale)
