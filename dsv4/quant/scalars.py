"""Numbers as tensors, made once.

At one row an operation costs what its call costs, and PyTorch makes a tensor of every Python number it meets: 1.8 us
for `x.mul_(2.0)` on a CPU, 0.7 us for `x.mul_(scalar(2.0))`.
"""

import functools

import torch
from torch import Tensor


@functools.cache
def scalar(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """`value` as a 0-d tensor on the CPU, which operations on any device take for a number. Not to be written to.

    Operations of its own dtype get the bits they get from the number; BF16 ones would round it to BF16 first.
    """
    with torch.inference_mode(False):  # kept beyond the mode it is first needed in
        return torch.tensor(value, dtype=dtype)
