"""Twin of decode_layers: the twins of its ops, one phase after the other."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dsv4.kernels.attn_inputs.attn_inputs_ref import attn_inputs_ref
from dsv4.kernels.decode_layers.phases import Attention, Experts, Index, Inputs, Linear, Phase, Product, Seam
from dsv4.kernels.ffn_inputs.ffn_inputs_ref import ffn_inputs_ref
from dsv4.kernels.grouped_linear.grouped_linear_ref import grouped_linear_ref
from dsv4.kernels.grouped_linear.operand import GroupedOperand
from dsv4.kernels.index_topk.index_topk_ref import index_topk_ref
from dsv4.kernels.linear.linear_ref import linear_ref
from dsv4.kernels.mhc_seam.mhc_seam_ref import mhc_seam_ref
from dsv4.kernels.moe.moe_ref import moe_ref
from dsv4.kernels.sparse_attention.sparse_attention_ref import sparse_attention_ref

_TWINS: dict[type, Any] = {
    Seam: mhc_seam_ref,
    Inputs: attn_inputs_ref,
    Index: index_topk_ref,
    Attention: sparse_attention_ref,
}


def decode_layers_ref(h: Tensor, program: Any) -> Tensor:
    for phase in program.phases:
        for to, value in zip(*_results(phase), strict=True):
            to.copy_(value)
    y: Tensor = program.y
    return y


def _results(phase: Phase) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Where a phase's results go, and what they are."""
    if isinstance(phase, Linear):
        made = [_product(product) for product in phase.products]
        return [to for product in phase.products for to in product.out], [y for ys in made for y in ys]
    if isinstance(phase, Experts):
        ids, weights, activated = ffn_inputs_ref(*phase.args, **phase.routing)
        (shared,) = linear_ref(activated, phase.shared_w2)
        given = phase.x, phase.experts, ids, weights, shared
        return [phase.out], [moe_ref(*given, limit=phase.routing["limit"])]
    result: Any = _TWINS[type(phase)](*phase.args, **phase.named)
    return phase.out, result if isinstance(result, tuple) else (result,)


def _product(product: Product) -> list[Tensor]:
    if isinstance(product.operand, GroupedOperand):
        return [grouped_linear_ref(product.x, product.operand)]
    return linear_ref(product.x, product.operand)
