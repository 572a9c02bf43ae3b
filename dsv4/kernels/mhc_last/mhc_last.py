"""mHC after the last layer: leave its site and collapse the streams for the final norm and the lm head."""

from torch import Tensor

from dsv4.kernels.launch import contiguous, dtype_code, four_streams, result, row_stride, same_device
from dsv4.kernels.loader import Kernel
from dsv4.kernels.mhc_last.mhc_last_ref import mhc_last_ref
from dsv4.kernels.mhc_pre.shares import shares_of
from dsv4.kernels.mhc_seam.peers import Peers, check_part, meeting
from dsv4.kernels.op import op

_KERNEL = Kernel("mhc_last", "ppppppppppqiqffippii")


@op(
    "mhc_last",
    ref=mhc_last_ref,
    shapes={
        "y": "T D : bf16 f32",
        "h": "T M D : bf16 f32",
        "post": "T M : f32",
        "comb": "T M M : f32",
        "fn": "M MD : f32",
        "base": "M : f32",
        "scale": "1 : f32",
    },
)
def mhc_last(
    y: Tensor,
    h: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    *,
    hc_eps: float,
    norm_eps: float,
    peers: Peers | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """h' = mhc_post(y, h, post, comb); -> h', mhc_head(h'): bit for bit the two ops apart.

    y [T, D], h [T, M, D] bf16|f32, post [T, M], comb [T, M, M] f32 of the last site; fn [M, M*D], base [M], scale [1]:
    `hc_head_{fn,base,scale}` -> h' [T, M, D], x [T, D] in h's dtype. Launches as mhc_seam does. peers: as there, y
    [T, D] f32 is then this rank's part, up to T = ROWS, and all ranks must call alike.
    """
    tokens, streams, width = four_streams("mhc_last", h, fn, h.shape[1])
    check_part("mhc_last", y, h, peers)
    contiguous("mhc_last", h=h, post=post, comb=comb, fn=fn, base=base, scale=scale)
    same_device("mhc_last", y.device, h=h, post=post, comb=comb, fn=fn, base=base, scale=scale)
    given = out or (None, None)
    new = result("mhc_last", given[0], tuple(h.shape), h.dtype, h.device)
    x = result("mhc_last", given[1], (tokens, width), h.dtype, h.device)
    tensors = y, h, post, comb, fn, base, scale, new, x, shares_of("mhc_last", h, streams + 1)
    stride, code = row_stride("mhc_last", "y", y), dtype_code("mhc_last", "h", h)
    _KERNEL(y.device, *tensors, tokens, width, stride, hc_eps, norm_eps, code, *meeting(peers))
    return new, x
