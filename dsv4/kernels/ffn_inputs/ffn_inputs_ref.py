"""Twin of ffn_inputs: the two ops it does side by side."""

from torch import Tensor

from dsv4.kernels.router.router_ref import router_ref
from dsv4.kernels.swiglu.swiglu_ref import swiglu_ref


def ffn_inputs_ref(
    logits: Tensor,
    gate: Tensor,
    up: Tensor,
    bias: Tensor | None,
    tid2eid: Tensor | None,
    tokens: Tensor,
    *,
    topk: int,
    route_scale: float,
    limit: float,
) -> tuple[Tensor, Tensor, Tensor]:
    ids, weights = router_ref(logits, bias, tid2eid, tokens, topk=topk, route_scale=route_scale)
    return ids, weights, swiglu_ref(gate, up, limit)
