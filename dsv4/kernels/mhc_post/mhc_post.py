"""mHC, leaving a site: the sublayer's output joins the mixed streams."""

from torch import Tensor

from dsv4.kernels.mhc_post.mhc_post_ref import mhc_post_ref
from dsv4.kernels.op import no_kernel, op


@op(
    "mhc_post",
    ref=mhc_post_ref,
    shapes={"y": "T D : bf16 f32", "h": "T M D : bf16 f32", "post": "T M : f32", "comb": "T M M : f32"},
)
def mhc_post(y: Tensor, h: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """h'_k = post_k * y + sum_j comb[j, k] * h_j (the FIRST index is summed), float32 inside, one rounding.

    y [T, D], h [T, M, D] bf16|f32, post [T, M] f32, comb [T, M, M] f32 -> [T, M, D] in h's dtype.
    """
    raise no_kernel("mhc_post")
