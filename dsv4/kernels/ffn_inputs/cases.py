"""Cases of ffn_inputs: one launch against the launches of its ops, bit for bit."""

from collections.abc import Iterator

from torch import Tensor

from dsv4.kernels.case import DTYPES, Case, Maker, bits
from dsv4.kernels.ffn_inputs.ffn_inputs import ffn_inputs
from dsv4.kernels.router.router import router
from dsv4.kernels.swiglu.swiglu import swiglu


def apart(
    logits: Tensor, gate: Tensor, up: Tensor, bias: Tensor | None, tid2eid: Tensor | None, tokens: Tensor, *,
    topk: int, route_scale: float, limit: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    ids, weights = router(logits, bias, tid2eid, tokens, topk=topk, route_scale=route_scale)
    return ids, weights, swiglu(gate, up, limit)


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    sizes = [(3, 256, 6, 2048), (5, 7, 3, 33), (0, 256, 6, 2048), (2, 384, 6, 3072)]
    sizes += [] if quick else [(1, 256, 6, 2048), (1, 384, 6, 3072), (64, 256, 6, 2048), (8192, 384, 6, 3072)]
    for dtype in DTYPES:
        for rows, experts, topk, width in sizes:
            tokens, how = make.integers(0, 1000, rows), {"topk": topk, "route_scale": 1.5, "limit": 10.0}
            logits, bias = make.normal(rows, experts, scale=4), make.normal(experts)
            both = make.normal(rows, 2 * width, dtype=dtype, scale=8)  # slices of one product
            table, name = make.integers(0, experts, 1000, topk), f"[{rows}, {experts}] top {topk}, [{rows}, {width}]"
            halves = both[:, :width], both[:, width:]
            for args, kind in (((bias, None), "scores"), ((None, table), "hash")):
                given = logits, *halves, *args, tokens
                yield Case("ffn_inputs", f"{name} {kind}", dtype, ffn_inputs, apart, given, bits, how)
