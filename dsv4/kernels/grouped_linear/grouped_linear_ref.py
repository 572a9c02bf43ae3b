"""Twin of grouped_linear."""

import torch
from torch import Tensor

from dsv4.kernels.grouped_linear.operand import GroupedOperand
from dsv4.kernels.linear.operand import treat


def grouped_linear_ref(o: Tensor, operand: GroupedOperand) -> Tensor:
    groups = operand.dense.shape[0]
    rows = treat(o.unflatten(-1, (groups, -1)), operand.treatment)
    return torch.bmm(rows.transpose(0, 1), operand.dense).transpose(0, 1).flatten(1).to(o.dtype)
