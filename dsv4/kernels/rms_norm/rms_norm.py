"""RMS norm with a learned weight: `attn_norm`, `ffn_norm`, `q_norm`, `kv_norm`, `compressor.norm`, `norm`."""

from torch import Tensor

from dsv4.kernels.launch import contiguous, dtype_code, result, row_stride, same_device
from dsv4.kernels.loader import Kernel
from dsv4.kernels.op import op
from dsv4.kernels.rms_norm.rms_norm_ref import rms_norm_ref

_KERNEL = Kernel("rms_norm", "pppqqifi")


@op("rms_norm", ref=rms_norm_ref, shapes={"x": "* N : bf16 f32", "weight": "N : f32"})
def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight, float32 inside, one rounding to x's dtype.

    x [..., N] bf16|f32, weight [N] f32 (BF16 in the file) -> [..., N] in x's dtype. T = 0 gives an empty result.
    """
    n, stride = x.shape[-1], row_stride("rms_norm", "x", x)
    contiguous("rms_norm", weight=weight)
    same_device("rms_norm", x.device, weight=weight)
    out = result("rms_norm", out, tuple(x.shape), x.dtype, x.device)
    rows = x.numel() // n if n else 0
    _KERNEL(x.device, x, weight, out, rows, stride, n, eps, dtype_code("rms_norm", "x", x))
    return out
