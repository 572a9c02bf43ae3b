"""Walsh-Hadamard transform in natural (Sylvester) order, used on the indexer's queries and keys (SPEC 2.8)."""

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.quant.formats import as_float32


def hadamard(x: Tensor) -> Tensor:
    """x [..., n] @ H_n * n^-0.5 in x's dtype (float32 or bfloat16), n a power of two; H[i, j] = (-1)^popcount(i & j).

    Butterflies in float32, stride 1 first, then one multiplication and one rounding, so a row's bits do not depend on
    how many rows there are (a matrix product would not promise that). Its own inverse, up to rounding.
    Raises KernelError when n is not a power of two.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise KernelError(f"hadamard over {n} entries; expected a power of two in the last dimension")
    rows = x.numel() // n
    y = as_float32(x).reshape(rows, n).t().contiguous()  # rows innermost, so that every stride is a run of whole rows
    stride = 1
    while stride < n:
        upper, lower = y.view(n // (2 * stride), 2, stride, rows).unbind(1)
        y = torch.stack((upper + lower, upper - lower), dim=1)
        stride *= 2
    return (y.view(n, rows).t().contiguous() * n**-0.5).view(x.shape).to(x.dtype)
