"""mHC between two sublayers: leave one site, enter the next, norm its input."""

import torch
from torch import Tensor

from dsv4.kernels.launch import contiguous, dtype_code, four_streams, result, row_stride, same_device
from dsv4.kernels.loader import Kernel
from dsv4.kernels.mhc_pre.shares import shares_of
from dsv4.kernels.mhc_seam.mhc_seam_ref import mhc_seam_ref
from dsv4.kernels.mhc_seam.peers import Peers, check_part, meeting
from dsv4.kernels.op import op

PAIRS = 10  # of four streams, each with itself and the others: sums of their products
_KERNEL = Kernel("mhc_seam", "pppppppppppppqiqiffippii")


@op(
    "mhc_seam",
    ref=mhc_seam_ref,
    shapes={
        "y": "T D : bf16 f32",
        "h": "T M D : bf16 f32",
        "post": "T M : f32",
        "comb": "T M M : f32",
        "fn": "O MD : f32",
        "base": "O : f32",
        "scale": "O : f32",
        "weight": "D : f32",
    },
)
def mhc_seam(
    y: Tensor,
    h: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    weight: Tensor,
    *,
    sinkhorn_iters: int,
    hc_eps: float,
    norm_eps: float,
    peers: Peers | None = None,
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h' = mhc_post(y, h, post, comb); x, post', comb' = mhc_pre(h'); -> h', rms_norm(x), post', comb'.

    y [T, D], h [T, M, D] bf16|f32, post [T, M], comb [T, M, M] f32 of the site that ends; fn [O, M*D], base, scale [O],
    weight [D] f32 of the one that begins -> h' [T, M, D], x [T, D] in h's dtype, post' [T, M], comb' [T, M, M] f32.
    Rounded where the three ops round: h', the collapsed x, the normed x; the norm's sum of squares is that of x before
    its rounding. A row's bits do not depend on T. One launch up to T = 128, two beyond, or where the blocks of one do
    not all run at once; launches of a device must follow one another (blocks of one launch tell each other sums in one
    place). Reads T*(M+1)*D*2 + (2+M)*M*M*D*4 bytes and writes T*(M+1)*D*2.

    peers: y [T, D] f32 is this rank's part; the parts are added in the order of ranks and rounded once to h's dtype.
    Up to T = ROWS. Waits for all ranks, which must call it alike.
    """
    tokens, streams, width = four_streams("mhc_seam", h, fn, (2 + h.shape[1]) * h.shape[1])
    check_part("mhc_seam", y, h, peers)
    contiguous("mhc_seam", h=h, post=post, comb=comb, fn=fn, base=base, scale=scale, weight=weight)
    same_device("mhc_seam", y.device, h=h, post=post, comb=comb, fn=fn, base=base, scale=scale, weight=weight)
    given = out or (None, None, None, None)
    new = result("mhc_seam", given[0], tuple(h.shape), h.dtype, h.device)
    x = result("mhc_seam", given[1], (tokens, width), h.dtype, h.device)
    new_post = result("mhc_seam", given[2], (tokens, streams), torch.float32, h.device)
    new_comb = result("mhc_seam", given[3], (tokens, streams, streams), torch.float32, h.device)
    shares = shares_of("mhc_seam", h, len(fn) + PAIRS)
    tensors = y, h, post, comb, fn, base, scale, weight, new, x, new_post, new_comb, shares
    stride, code = row_stride("mhc_seam", "y", y), dtype_code("mhc_seam", "h", h)
    numbers = tokens, width, stride, sinkhorn_iters, hc_eps, norm_eps, code
    _KERNEL(y.device, *tensors, *numbers, *meeting(peers))
    return new, x, new_post, new_comb
