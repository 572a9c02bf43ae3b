"""Weight matrices in FP16 for products on a CPU, where FP16 holds them exactly.

FBGEMM widens FP16 in registers and accumulates in float32: the same products as in float32, half the bytes read and no
float32 copy written. At one row that takes a third of the time, or less. It adds along K in one order whatever the
number of rows, so a row's bits do not depend on the rows beside it.

PyTorch calls these functions deprecated but has none as cheap in their place. Without them `pack` gives None, and the
caller multiplies in float32.
"""

import math
import warnings

import torch
from torch import Tensor

ONE_THREAD = 2**26  #: multiplications up to which FBGEMM's one thread does not lose to a float32 product on several


class HalfMatrix:
    """A matrix [N, K] as FBGEMM packs it. factor: a power of two (0-d float32) that undoes its scaling, None for 1."""

    def __init__(self, packed: Tensor, factor: Tensor | None):
        self.packed, self.factor = packed, factor

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., K] float32 -> [..., N] float32."""
        y = torch.fbgemm_linear_fp16_weight_fp32_activation(x, self.packed, None)
        return y if self.factor is None else y.mul_(self.factor)


def available() -> bool:
    """Whether this build of PyTorch can pack and multiply on this CPU."""
    names = ("fbgemm_pack_gemm_matrix_fp16", "fbgemm_linear_fp16_weight_fp32_activation")
    return "fbgemm" in torch.backends.quantized.supported_engines and all(hasattr(torch, name) for name in names)


def pays(multiplications: int) -> bool:
    """Whether a product of so many multiplications should be FBGEMM's, which runs on one thread."""
    return multiplications <= ONE_THREAD or torch.get_num_threads() == 1


def pack(values: Tensor) -> HalfMatrix | None:
    """Pack values [N, K] bfloat16 or float32; None if FP16 cannot hold them exactly, off a CPU and without FBGEMM.

    Values are taken as they are or, when small ones would be lost, scaled by the power of two that brings the largest
    below 2^15.
    """
    if not (values.is_cpu and values.numel() and available()):
        return None
    wide = values.float()
    for scale in (1.0, 2.0 ** (15 - math.frexp(float(wide.abs().max()))[1])):
        scaled = wide * scale
        if torch.equal(scaled.half().float(), scaled):
            return HalfMatrix(_packed(scaled), None if scale == 1 else torch.tensor(1 / scale))
    return None


def _packed(values: Tensor) -> Tensor:
    with warnings.catch_warnings(), torch.inference_mode(False):  # a kept tensor must be of use outside that mode too
        warnings.simplefilter("ignore", UserWarning)  # both functions say once that they are deprecated
        packed = torch.fbgemm_pack_gemm_matrix_fp16(values)
        torch.fbgemm_linear_fp16_weight_fp32_activation(values[:1], packed, None)
    return packed
