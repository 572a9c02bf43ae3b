"""Per-head RMS norm of the queries (no weight) and RoPE."""

from torch import Tensor

from dsv4.kernels.launch import dtype_code, heads_of, result, rotations, same_device
from dsv4.kernels.loader import Kernel
from dsv4.kernels.op import op
from dsv4.kernels.q_norm_rope.q_norm_rope_ref import q_norm_rope_ref

_KERNEL = Kernel("q_norm_rope", "pppqiiiqqqfi")


@op("q_norm_rope", ref=q_norm_rope_ref, shapes={"q": "T H N : bf16 f32"})
def q_norm_rope(q: Tensor, cis: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """q * rsqrt(mean(q^2) + eps) per head, then rope.

    q [T, H, Dh] bf16|f32, cis [T, R/2] complex64 -> [T, H, Dh]. The norm is computed in q's own dtype, as DeepSeek's
    code does: in BF16 the square, its mean and the reciprocal root are each rounded.
    """
    rows, heads, n = heads_of("q_norm_rope", "q", q).shape
    cis_stride = rotations("q_norm_rope", cis, rows, n)
    same_device("q_norm_rope", q.device, cis=cis)
    out = result("q_norm_rope", out, (rows, heads, n), q.dtype, q.device)
    strides = q.stride(0), q.stride(1), cis_stride
    code = dtype_code("q_norm_rope", "q", q)
    _KERNEL(q.device, q, cis, out, rows, heads, n, 2 * cis.shape[1], *strides, eps, code)
    return out
