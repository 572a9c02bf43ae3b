"""RMS norm with a learned weight: `attn_norm`, `ffn_norm`, `q_norm`, `kv_norm`, `compressor.norm`, `norm`."""

from torch import Tensor

from dsv4.kernels.op import no_kernel, op
from dsv4.kernels.rms_norm.rms_norm_ref import rms_norm_ref


@op("rms_norm", ref=rms_norm_ref, shapes={"x": "* N : bf16 f32", "weight": "N : f32"})
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight, float32 inside, one rounding to x's dtype.

    x [..., N] bf16|f32, weight [N] f32 (BF16 in the file) -> [..., N] in x's dtype. T = 0 gives an empty result.
    """
    raise no_kernel("rms_norm")
