"""Walsh-Hadamard transform in natural (Sylvester) order, used on the indexer's queries and keys (SPEC 2.8)."""

import functools

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.quant.formats import as_float32
from dsv4.quant.scalars import scalar


@functools.cache
def _matrix(n: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a cached table must stay usable outside the mode it was first needed in
        h = torch.ones(1, 1)
        while len(h) < n:
            h = torch.cat([torch.cat([h, h], dim=1), torch.cat([h, -h], dim=1)])
        return h.to(device)


def hadamard(x: Tensor) -> Tensor:
    """x [..., n] @ H_n * n^-0.5 in x's dtype (float32 or bfloat16), n a power of two; H[i, j] = (-1)^popcount(i & j).

    One float32 product with the matrix (at 1 to 64 rows of 128 a tenth of the cost of seven butterfly passes on a CPU),
    one multiplication, one rounding. Its own inverse, up to rounding. Raises KernelError when n is not a power of two.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise KernelError(f"hadamard over {n} entries; expected a power of two in the last dimension")
    y = torch.nn.functional.linear(as_float32(x), _matrix(n, x.device))
    return y.mul_(scalar(n**-0.5)).to(x.dtype)
