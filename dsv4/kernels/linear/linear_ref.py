"""Twin of linear."""

import torch
from torch import Tensor

from dsv4.kernels.linear.operand import LinearOperand, treat


def linear_ref(x: Tensor, operand: LinearOperand, dtype: torch.dtype | None = None) -> list[Tensor]:
    dtype = dtype or x.dtype
    parts = {}
    for how, matrix in operand.joined.items():
        y = torch.nn.functional.linear(treat(x, how), matrix).to(dtype)
        sizes = [w.shape[-2] for w, t in zip(operand.weights, operand.treatments, strict=True) if t == how]
        parts[how] = iter(torch.split_with_sizes(y, sizes, -1) if len(sizes) > 1 else (y,))
    return [next(parts[how]) for how in operand.treatments]
