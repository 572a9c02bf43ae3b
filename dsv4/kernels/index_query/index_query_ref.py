"""Twin of index_query."""

from torch import Tensor

from dsv4.kernels.rope.rope_ref import rope_ref
from dsv4.quant import fp8
from dsv4.quant.hadamard import hadamard


def index_rounding_ref(x: Tensor, quantize: bool) -> Tensor:
    """The indexer's trained-in rounding of queries and keys: Hadamard, then E2M1 in groups of 32."""
    return fp8.fp4_act_fake_quant(hadamard(x), 32) if quantize else x


def index_query_ref(q: Tensor, cis: Tensor, *, quantize: bool) -> Tensor:
    return index_rounding_ref(rope_ref(q.clone(), cis), quantize)
