"""The indexer's queries: RoPE, Hadamard, E2M1."""

from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.index_query.index_query_ref import index_query_ref
from dsv4.kernels.launch import bf16_only, heads_of, result, rotations, same_device
from dsv4.kernels.loader import Kernel
from dsv4.kernels.op import op

_KERNEL = Kernel("index_query", "pppqiiqqqi")
WIDTH = 128  # index_head_dim of V4


@op("index_query", ref=index_query_ref, shapes={"q": "T H N : bf16 f32"})
def index_query(q: Tensor, cis: Tensor, *, quantize: bool, out: Tensor | None = None) -> Tensor:
    """q [T, Hi, Ci] bf16|f32 (indexer.wq_b's output), cis [T, R/2] complex64 -> [T, Hi, Ci] ready for scoring.

    `quantize`: Hadamard over all Ci channels (times Ci^-0.5), then E2M1 in groups of 32 with E8M0 scales. Without it
    neither is applied: the rotation alone changes no dot product. On a GPU BF16, Ci = 128, and heads start at
    multiples of 16 bytes.
    """
    rows, heads, width = heads_of("index_query", "q", q).shape
    if width != WIDTH:
        raise KernelError(
            f"index_query: index_head_dim is {width} and the kernel is written for {WIDTH}; run the twin "
            "(DSV4_REF=index_query)"
        )
    bf16_only("index_query", "q", q)
    cis_stride = rotations("index_query", cis, rows, width)
    same_device("index_query", q.device, cis=cis)
    out = result("index_query", out, (rows, heads, width), q.dtype, q.device)
    strides = q.stride(0), q.stride(1), cis_stride
    _KERNEL(q.device, q, cis, out, rows, heads, 2 * cis.shape[1], *strides, quantize)
    return out
