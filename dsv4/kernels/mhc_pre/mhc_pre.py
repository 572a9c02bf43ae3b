"""mHC, entering a site: collapse the M residual streams into the sublayer's input and compute how it goes back."""

import torch
from torch import Tensor

from dsv4.kernels.launch import contiguous, dtype_code, four_streams, result, same_device
from dsv4.kernels.loader import Kernel
from dsv4.kernels.mhc_pre.mhc_pre_ref import mhc_pre_ref
from dsv4.kernels.mhc_pre.shares import shares_of
from dsv4.kernels.op import op

_KERNEL = Kernel("mhc_pre", "ppppppppqiiffi")


@op(
    "mhc_pre",
    ref=mhc_pre_ref,
    shapes={"h": "T M D : bf16 f32", "fn": "O MD : f32", "base": "O : f32", "scale": "O : f32"},
)
def mhc_pre(
    h: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    *,
    sinkhorn_iters: int,
    hc_eps: float,
    norm_eps: float,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """h [T, M, D] -> x [T, D] in h's dtype, post [T, M] f32, comb [T, M, M] f32.

    fn [O, M*D], base [O]: `hc_{attn,ffn}_{fn,base}`, O = (2+M)*M rows ordered pre | post | comb; scale [O]: the three
    of `hc_{attn,ffn}_scale`, each repeated for the rows it multiplies.
    pre = sigmoid(.) + hc_eps, post = 2 sigmoid(.), comb = Sinkhorn of the M x M rest, ending on a column step.
    All in float32; x = sum_j pre_j h_j is rounded once. A row's bits do not depend on T. One launch up to T = 8, two
    beyond, or where the blocks of one do not all run at once; launches of a device must follow one another (blocks of
    one launch tell each other sums in one place). Reads T*M*D*2 + (2+M)*M*M*D*4 bytes.
    """
    mixes = (2 + h.shape[1]) * h.shape[1]
    tokens, streams, width = four_streams("mhc_pre", h, fn, mixes)
    contiguous("mhc_pre", h=h, fn=fn, base=base, scale=scale)
    same_device("mhc_pre", h.device, fn=fn, base=base, scale=scale)
    given = out or (None, None, None)
    x = result("mhc_pre", given[0], (tokens, width), h.dtype, h.device)
    post = result("mhc_pre", given[1], (tokens, streams), torch.float32, h.device)
    comb = result("mhc_pre", given[2], (tokens, streams, streams), torch.float32, h.device)
    numbers = tokens, width, sinkhorn_iters, hc_eps, norm_eps, dtype_code("mhc_pre", "h", h)
    _KERNEL(h.device, h, fn, base, scale, x, post, comb, shares_of("mhc_pre", h, mixes + 1), *numbers)
    return x, post, comb
