"""What the MoE makes of its first projections: the experts of every token, and the shared expert's activation."""

import torch
from torch import Tensor

from dsv4.kernels.ffn_inputs.ffn_inputs_ref import ffn_inputs_ref
from dsv4.kernels.launch import result, row_stride, same_device, same_dtype
from dsv4.kernels.loader import Kernel
from dsv4.kernels.op import op
from dsv4.kernels.router.router import ARGUMENTS, arguments_of, router
from dsv4.kernels.swiglu.swiglu import swiglu

_KERNEL = Kernel("ffn_inputs", ARGUMENTS + "pppiqqf")


@op(
    "ffn_inputs",
    ref=ffn_inputs_ref,
    shapes={"logits": "T E : f32", "gate": "T F : bf16 f32", "up": "T F : bf16 f32"},
)
def ffn_inputs(
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
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """router(logits, ...) and swiglu(gate, up, limit) side by side.

    logits [T, E] f32, gate, up [T, F] bf16|f32; the rest as those ops say -> ids [T, K] i64, weights [T, K] f32, and
    the activation [T, F] in gate's dtype. On a GPU one launch in BF16, in float32 those of the ops; each result has the
    bits that its op by itself gives it.
    """
    given = out or (None, None, None)
    routed = None if out is None else out[:2]
    if gate.dtype != torch.bfloat16:
        ids, weights = router(logits, bias, tid2eid, tokens, topk=topk, route_scale=route_scale, out=routed)
        return ids, weights, swiglu(gate, up, limit, out=given[2])
    (ids, weights), route = arguments_of("ffn_inputs", logits, bias, tid2eid, tokens, topk, route_scale, routed)
    same_dtype("ffn_inputs", "gate", gate, "up", up)
    same_device("ffn_inputs", logits.device, gate=gate, up=up)
    activated = result("ffn_inputs", given[2], tuple(gate.shape), gate.dtype, gate.device)
    strides = row_stride("ffn_inputs", "gate", gate), row_stride("ffn_inputs", "up", up)
    _KERNEL(logits.device, *route, gate, up, activated, gate.shape[1], *strides, limit)
    return ids, weights, activated
