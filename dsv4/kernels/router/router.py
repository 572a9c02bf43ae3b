"""Which experts a token goes to, and with which weight."""

from torch import Tensor

from dsv4.kernels.op import no_kernel, op
from dsv4.kernels.router.router_ref import router_ref


@op("router", ref=router_ref, shapes={"logits": "T E : f32"})
def router(
    logits: Tensor, bias: Tensor | None, tid2eid: Tensor | None, tokens: Tensor, *, topk: int, route_scale: float
) -> tuple[Tensor, Tensor]:
    """logits [T, E] f32 -> ids [T, K] i64, weights [T, K] f32.

    s = sqrt(softplus(logits)). Score layers: the K best of s + bias [E] f32, equal values: the lower expert wins. Hash
    layers: ids = tid2eid[tokens], tid2eid [V, K] i64, tokens [T] i64, and no bias. weights = s / sum(s) * route_scale,
    unbiased.
    """
    raise no_kernel("router")
