"""`wo_a`: the grouped output projection of attention."""

from collections.abc import Sequence

from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.grouped_linear.grouped_linear_ref import grouped_linear_ref
from dsv4.kernels.grouped_linear.operand import GroupedOperand
from dsv4.kernels.launch import bf16_only, result, row_stride, same_device
from dsv4.kernels.op import op
from dsv4.kernels.quantize.quantize_act import quantize_act


@op("grouped_linear", ref=grouped_linear_ref, shapes={"o": "T GK : bf16 f32"})
def grouped_linear(o: Tensor, operand: GroupedOperand, *, out: Tensor | None = None) -> Tensor:
    """out[t, g*r + i] = sum_k o[t, g*K + k] * wo_a[g*r + i, k].

    o [T, G*K] bf16|f32 (heads in order, H/G of them per group) -> [T, G*r] in o's dtype, float32 accumulation, one
    rounding. On a GPU o is BF16, and the kernels are those of linear: one or two launches for all groups of up to 64
    rows.
    """
    if operand.launcher is None:
        raise KernelError("grouped_linear: o is on a GPU and the operand's weights are not; make it of weights there")
    groups, (rank, columns) = len(operand.tiled), operand.tiled[0].shape
    bf16_only("grouped_linear", "o", o)
    if o.shape[1] != groups * columns:
        raise KernelError(f"grouped_linear: o has {o.shape[1]} columns, expected {groups} groups of {columns}")
    same_device("grouped_linear", operand.launcher.device, o=o)
    row_stride("grouped_linear", "o", o)
    y = result("grouped_linear", out, (len(o), groups * rank), o.dtype, o.device)
    split = o.unflatten(1, (groups, columns))
    row_scales: Sequence[Tensor | None] = [None] * groups
    if operand.treatment != "none":
        split, scale = quantize_act(split, operand.treatment)
        row_scales = row_scales if scale is None else scale.unbind(1)
    operand.launcher(split.unbind(1), row_scales, y.unflatten(1, (groups, rank)).unbind(1))
    return y
