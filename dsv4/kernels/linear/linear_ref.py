"""Twin of linear."""

import torch
from torch import Tensor

from dsv4.kernels.linear.operand import LinearOperand
from dsv4.quant.activations import treat


def linear_ref(x: Tensor, operand: LinearOperand) -> list[Tensor]:
    out: list[Tensor] = [x] * len(operand.projections)
    for part in operand.joined:
        y = part.matrix.matmul(treat(x, part.treatment), half=x.dtype == torch.bfloat16)
        for place, columns in zip(part.places, torch.split_with_sizes(y, part.rows, -1), strict=True):
            out[place] = columns if operand.projections[place].f32 else columns.to(x.dtype)
    return out
