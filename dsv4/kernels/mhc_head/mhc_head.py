"""mHC, after the last layer: collapse the streams for the final norm and the lm head."""

from torch import Tensor

from dsv4.kernels.mhc_head.mhc_head_ref import mhc_head_ref
from dsv4.kernels.op import no_kernel, op


@op(
    "mhc_head",
    ref=mhc_head_ref,
    shapes={"h": "T M D : bf16 f32", "fn": "M MD : f32", "base": "M : f32", "scale": "1 : f32"},
)
def mhc_head(h: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, hc_eps: float, norm_eps: float) -> Tensor:
    """sum_j (sigmoid(z_j * scale + base_j) + hc_eps) * h_j; no Sinkhorn.

    h [T, M, D] bf16|f32; fn [M, M*D], base [M], scale [1]: `hc_head_{fn,base,scale}` -> [T, D] in h's dtype.
    """
    raise no_kernel("mhc_head")
