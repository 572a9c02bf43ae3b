"""`wo_a`: the grouped output projection of attention."""

from torch import Tensor

from dsv4.kernels.grouped_linear.grouped_linear_ref import grouped_linear_ref
from dsv4.kernels.grouped_linear.operand import GroupedOperand
from dsv4.kernels.op import no_kernel, op


@op("grouped_linear", ref=grouped_linear_ref, shapes={"o": "T GK : bf16 f32"})
def grouped_linear(o: Tensor, operand: GroupedOperand) -> Tensor:
    """out[t, g*r + i] = sum_k o[t, g*K + k] * wo_a[g*r + i, k].

    o [T, G*K] bf16|f32 (heads in order, H/G of them per group) -> [T, G*r] in o's dtype, float32 accumulation, one
    rounding.
    """
    raise no_kernel("grouped_linear")
