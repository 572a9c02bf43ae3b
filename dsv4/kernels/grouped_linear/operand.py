"""The weight of `wo_a`: G block-diagonal projections stored as one [G*r, K] matrix, rows g*r .. (g+1)*r for group g."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4.errors import KernelError
from dsv4.kernels.linear.operand import Dense, dense
from dsv4.quant.activations import Act, Treatment
from dsv4.quant.weights import Weight


@dataclass(frozen=True)
class GroupedOperand:
    """`groups` [G, r, K] is what the CPU multiplies with."""

    weight: Weight
    treatment: Treatment
    groups: Dense

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


def grouped_operand(weight: Weight, groups: int, *, act: Act) -> GroupedOperand:
    """Split `weight` [G*r, K] by groups. Only W4A4 quantises the input: DeepSeek's code feeds it plain BF16."""
    rows = weight.shape[-2]
    if rows % groups:
        raise KernelError(f"grouped_linear: {rows} rows of wo_a do not split into o_groups = {groups}")
    four_bit = weight.format in ("nvfp4", "mxfp4")
    whole = dense(weight)
    alpha = None if whole.alpha is None else whole.alpha.unflatten(0, (groups, -1))
    split = Dense(whole.values.unflatten(0, (groups, -1)), alpha)
    return GroupedOperand(weight, "nvfp4" if act == "nvfp4" and four_bit else "none", split)
