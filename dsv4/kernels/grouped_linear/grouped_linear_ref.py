"""Twin of grouped_linear."""

import torch
from torch import Tensor

from dsv4.kernels.grouped_linear.operand import GroupedOperand
from dsv4.quant.activations import treat


def grouped_linear_ref(o: Tensor, operand: GroupedOperand) -> Tensor:
    groups, half = operand.groups, o.dtype == torch.bfloat16
    rows = treat(o.unflatten(-1, (len(groups.values), -1)), operand.treatment)
    parts = [groups.matmul(part, g, half=half) for g, part in enumerate(rows.unbind(1))]
    return torch.cat(parts, dim=1).to(o.dtype)
