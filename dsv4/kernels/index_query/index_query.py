"""The indexer's queries: RoPE, Hadamard, E2M1."""

from torch import Tensor

from dsv4.kernels.index_query.index_query_ref import index_query_ref
from dsv4.kernels.op import no_kernel, op


@op("index_query", ref=index_query_ref, shapes={"q": "T H N : bf16 f32"})
def index_query(q: Tensor, cis: Tensor, *, quantize: bool) -> Tensor:
    """q [T, Hi, Ci] bf16|f32 (indexer.wq_b's output), cis [T, R/2] complex64 -> [T, Hi, Ci] ready for scoring.

    `quantize`: Hadamard over all Ci channels (times Ci^-0.5), then E2M1 in groups of 32 with E8M0 scales. Without it
    neither is applied: the rotation alone changes no dot product.
    """
    raise no_kernel("index_query")
