"""mHC, entering a site: collapse the M residual streams into the sublayer's input and compute how it goes back."""

from torch import Tensor

from dsv4.kernels.mhc_pre.mhc_pre_ref import mhc_pre_ref
from dsv4.kernels.op import no_kernel, op


@op(
    "mhc_pre",
    ref=mhc_pre_ref,
    shapes={"h": "T M D : bf16 f32", "fn": "O MD : f32", "base": "O : f32", "scale": "O : f32"},
)
def mhc_pre(
    h: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, sinkhorn_iters: int, hc_eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """h [T, M, D] -> x [T, D] in h's dtype, post [T, M] f32, comb [T, M, M] f32.

    fn [O, M*D], base [O]: `hc_{attn,ffn}_{fn,base}`, O = (2+M)*M rows ordered pre | post | comb; scale [O]: the three
    of `hc_{attn,ffn}_scale`, each repeated for the rows it multiplies.
    pre = sigmoid(.) + hc_eps, post = 2 sigmoid(.), comb = Sinkhorn of the M x M rest, ending on a column step.
    All in float32; x = sum_j pre_j h_j is rounded once. Reads T*M*D*2 + (2+M)*M*M*D*4 bytes.
    """
    raise no_kernel("mhc_pre")
