"""Per-head RMS norm of the queries (no weight) and RoPE."""

from torch import Tensor

from dsv4.kernels.op import no_kernel, op
from dsv4.kernels.q_norm_rope.q_norm_rope_ref import q_norm_rope_ref


@op("q_norm_rope", ref=q_norm_rope_ref, shapes={"q": "T H N : bf16 f32"})
def q_norm_rope(q: Tensor, cis: Tensor, eps: float) -> Tensor:
    """q * rsqrt(mean(q^2) + eps) per head, then rope.

    q [T, H, Dh] bf16|f32, cis [T, R/2] complex64 -> [T, H, Dh]. The norm is computed in q's own dtype, as DeepSeek's
    code does: in BF16 the square, its mean and the reciprocal root are each rounded.
    """
    raise no_kernel("q_norm_rope")
