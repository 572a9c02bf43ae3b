"""Twin of grouped_linear."""

import torch
from torch import Tensor

from dsv4.kernels.grouped_linear.operand import GroupedOperand
from dsv4.quant.activations import treat


def grouped_linear_ref(o: Tensor, operand: GroupedOperand) -> Tensor:
    values, alpha = operand.groups.values, operand.groups.alpha
    rows = treat(o.unflatten(-1, (len(values), -1)), operand.treatment)
    y = torch.bmm(rows.transpose(0, 1), values.float().transpose(1, 2)).transpose(0, 1)
    return (y if alpha is None else y * alpha).flatten(1).to(o.dtype)
