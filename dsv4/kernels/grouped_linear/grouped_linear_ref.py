"""Twin of grouped_linear."""

import torch
from torch import Tensor

from dsv4.kernels.grouped_linear.operand import GroupedOperand
from dsv4.kernels.linear.operand import treat


def grouped_linear_ref(o: Tensor, operand: GroupedOperand) -> Tensor:
    rows = treat(o.unflatten(-1, (len(operand.groups), -1)), operand.treatment)
    y = torch.bmm(rows.transpose(0, 1), operand.groups.transpose(1, 2))
    return y.transpose(0, 1).flatten(1).to(o.dtype)
