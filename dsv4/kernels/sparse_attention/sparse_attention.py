"""Core attention: window entries and selected compressed entries under one softmax with a sink, un-rotated."""

from torch import Tensor

from dsv4.kernels.op import no_kernel, op
from dsv4.kernels.sparse_attention.sparse_attention_ref import sparse_attention_ref


@op("sparse_attention", ref=sparse_attention_ref, shapes={"q": "T H N : bf16 f32", "local": "* N : bf16 f32"})
def sparse_attention(
    q: Tensor,
    local: Tensor,
    local_rows: Tensor,
    pool: Tensor | None,
    pool_rows: Tensor | None,
    sink: Tensor,
    cis: Tensor,
    *,
    scale: float,
) -> Tensor:
    """softmax over (window | compressed | sink), times the entries, then the inverse RoPE of the query's position.

    q [T, H, Dh]; local [..., Dh] holds the window's entries (the ring, or this chunk and what preceded it), local_rows
    [T, W] i64 rows of it; pool [P, 64, Dh] pages of compressed entries, pool_rows [T, E] i64; -1 = nothing there. sink
    [H] f32 is a logit that takes probability and adds nothing. scale = Dh^-0.5; cis [T, R/2] complex64, conjugated: it
    rotates back. -> [T, H, Dh] in q's dtype. Logits and sums float32; unnormalised probabilities are rounded to q's
    dtype before they multiply the entries, as in DeepSeek's kernel. A row with nothing visible returns zeros.
    """
    raise no_kernel("sparse_attention")
