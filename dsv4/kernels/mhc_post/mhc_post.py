"""mHC, leaving a site: the sublayer's output joins the mixed streams."""

from torch import Tensor

from dsv4.kernels.launch import contiguous, dtype_code, four_streams, result, row_stride, same_device, same_dtype
from dsv4.kernels.loader import Kernel
from dsv4.kernels.mhc_post.mhc_post_ref import mhc_post_ref
from dsv4.kernels.op import op

_KERNEL = Kernel("mhc_post", "pppppqiqi")


@op(
    "mhc_post",
    ref=mhc_post_ref,
    shapes={"y": "T D : bf16 f32", "h": "T M D : bf16 f32", "post": "T M : f32", "comb": "T M M : f32"},
)
def mhc_post(y: Tensor, h: Tensor, post: Tensor, comb: Tensor, *, out: Tensor | None = None) -> Tensor:
    """h'_k = post_k * y + sum_j comb[j, k] * h_j (the FIRST index is summed), float32 inside, one rounding.

    y [T, D], h [T, M, D] bf16|f32, post [T, M] f32, comb [T, M, M] f32 -> [T, M, D] in h's dtype.
    """
    tokens, _, width = four_streams("mhc_post", h)
    same_dtype("mhc_post", "y", y, "h", h)
    contiguous("mhc_post", h=h, post=post, comb=comb)
    same_device("mhc_post", y.device, h=h, post=post, comb=comb)
    out = result("mhc_post", out, tuple(h.shape), h.dtype, h.device)
    numbers = tokens, width, row_stride("mhc_post", "y", y), dtype_code("mhc_post", "h", h)
    _KERNEL(y.device, y, h, post, comb, out, *numbers)
    return out
