"""The routed experts of a layer, and the sum with the shared expert."""

from torch import Tensor

from dsv4.kernels.moe.launch import launch_moe
from dsv4.kernels.moe.moe_ref import moe_ref
from dsv4.kernels.moe.operand import ExpertsOperand
from dsv4.kernels.op import op


@op("moe", ref=moe_ref, shapes={"x": "T D : bf16 f32"})
def moe(
    x: Tensor,
    operand: ExpertsOperand,
    ids: Tensor,
    weights: Tensor,
    shared: Tensor,
    *,
    limit: float,
    out: Tensor | None = None,
) -> Tensor:
    """sum_k w2[e_k] . (weights_k * silu(min(w1[e_k] x, limit)) * clamp(w3[e_k] x, +-limit)) + shared.

    x [T, D], ids [T, K] i64, weights [T, K] f32, shared [T, D] (the shared expert's output), in x's dtype or f32
    -> [T, D] in the dtype of shared: f32 is for a rank's part of the sum, which is rounded after the others' are added.
    The operand may hold some of the layer's experts: an id that names none of them, as -1 does, is left out of its sum.
    Gate and up are rounded to x's dtype, clamp and SwiGLU are float32, the routing weight comes before the rounding
    (and, when quantised, before the quantisation) of w2's input; the K outputs and the shared one are added in float32
    and rounded once, in the rising order of experts.

    On a GPU one launch for up to 8 tokens, four above (align, gate and up, down, sum); up to two more where the inputs
    are quantised. The one launch takes all processors at once: calls on several streams of a GPU must not overlap. Up
    to 128 tokens a row's bits do not depend on the rows beside it; above, the products are summed in another order.
    """
    return launch_moe(x, operand, ids, weights, shared, limit, out)
