"""mHC, after the last layer: collapse the streams for the final norm and the lm head."""

from torch import Tensor

from dsv4.kernels.launch import contiguous, dtype_code, four_streams, result, same_device
from dsv4.kernels.loader import Kernel
from dsv4.kernels.mhc_head.mhc_head_ref import mhc_head_ref
from dsv4.kernels.mhc_pre.shares import shares_of
from dsv4.kernels.op import op

_KERNEL = Kernel("mhc_head", "ppppppqiffi")


@op(
    "mhc_head",
    ref=mhc_head_ref,
    shapes={"h": "T M D : bf16 f32", "fn": "M MD : f32", "base": "M : f32", "scale": "1 : f32"},
)
def mhc_head(
    h: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    *,
    hc_eps: float,
    norm_eps: float,
    out: Tensor | None = None,
) -> Tensor:
    """sum_j (sigmoid(z_j * scale + base_j) + hc_eps) * h_j; no Sinkhorn.

    h [T, M, D] bf16|f32; fn [M, M*D], base [M], scale [1]: `hc_head_{fn,base,scale}` -> [T, D] in h's dtype.
    Launches as mhc_pre does.
    """
    tokens, streams, width = four_streams("mhc_head", h, fn, h.shape[1])
    contiguous("mhc_head", h=h, fn=fn, base=base, scale=scale)
    same_device("mhc_head", h.device, fn=fn, base=base, scale=scale)
    out = result("mhc_head", out, (tokens, width), h.dtype, h.device)
    code = dtype_code("mhc_head", "h", h)
    _KERNEL(
        h.device, h, fn, base, scale, out, shares_of("mhc_head", h, streams + 1), tokens, width, hc_eps, norm_eps, code
    )
    return out
