"""The weight of `wo_a`: G block-diagonal projections stored as one [G*r, K] matrix, rows g*r .. (g+1)*r for group g."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.linear.operand import Act, Treatment
from dsv4.quant.weights import Weight


@dataclass(frozen=True)
class GroupedOperand:
    """`dense` [G, K, r] float32 is what the CPU multiplies with."""

    weight: Weight
    treatment: Treatment
    dense: Tensor

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


def grouped_operand(weight: Weight, groups: int, *, act: Act) -> GroupedOperand:
    """Split `weight` [G*r, K] by groups. The input is quantised only for W4A4: DeepSeek's code feeds wo_a plain BF16."""
    rows = weight.shape[-2]
    if rows % groups:
        raise KernelError(f"grouped_linear: {rows} rows of wo_a do not split into o_groups = {groups}")
    four_bit = weight.format in ("nvfp4", "mxfp4")
    dense = weight.dequantize(torch.float32).unflatten(0, (groups, -1)).transpose(1, 2).contiguous()
    return GroupedOperand(weight, "nvfp4" if act == "nvfp4" and four_bit else "none", dense)
