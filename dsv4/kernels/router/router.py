"""Which experts a token goes to, and with which weight."""

from typing import Any

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.launch import contiguous, result, row_stride, same_device
from dsv4.kernels.loader import Kernel
from dsv4.kernels.op import op
from dsv4.kernels.router.router_ref import router_ref

ARGUMENTS = "ppppppqiqiqf"
_KERNEL = Kernel("router", ARGUMENTS)
_MAX_TOPK, _MAX_EXPERTS = 32, 1024  # a lane of a warp per chosen expert; 32 keys a lane


@op("router", ref=router_ref, shapes={"logits": "T E : f32"})
def router(
    logits: Tensor,
    bias: Tensor | None,
    tid2eid: Tensor | None,
    tokens: Tensor,
    *,
    topk: int,
    route_scale: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """logits [T, E] f32 -> ids [T, K] i64, weights [T, K] f32.

    s = sqrt(softplus(logits)). Score layers: the K best of s + bias [E] f32, equal values: the lower expert wins. Hash
    layers: ids = tid2eid[tokens], tid2eid [V, K] i64, tokens [T] i64, and no bias. weights = s / sum(s) * route_scale,
    unbiased.
    """
    made, arguments = arguments_of("router", logits, bias, tid2eid, tokens, topk, route_scale, out)
    _KERNEL(logits.device, *arguments)
    return made


def arguments_of(
    name: str,
    logits: Tensor,
    bias: Tensor | None,
    tid2eid: Tensor | None,
    tokens: Tensor,
    topk: int,
    route_scale: float,
    out: tuple[Tensor, Tensor] | None,
) -> tuple[tuple[Tensor, Tensor], list[Any]]:
    """The results and what ARGUMENTS names, checked for op `name`."""
    rows, experts = logits.shape
    if not 0 < topk <= min(experts, _MAX_TOPK) or experts > _MAX_EXPERTS:
        raise KernelError(
            f"{name}: topk = {topk} with {experts} experts; the kernel takes 1 to min(E, {_MAX_TOPK}) of at most "
            f"{_MAX_EXPERTS}"
        )
    _check(name, "bias", bias, torch.float32, (experts,))
    _check(name, "tid2eid", tid2eid, torch.int64, (tid2eid.shape[0] if tid2eid is not None else 0, topk))
    _check(name, "tokens", tokens, torch.int64, (rows,))
    contiguous(name, bias=bias, tid2eid=tid2eid, tokens=tokens)
    same_device(name, logits.device, bias=bias, tid2eid=tid2eid, tokens=tokens)
    given = out or (None, None)
    ids = result(name, given[0], (rows, topk), torch.int64, logits.device)
    weights = result(name, given[1], (rows, topk), torch.float32, logits.device)
    vocabulary = 0 if tid2eid is None else tid2eid.shape[0]
    numbers = rows, experts, row_stride(name, "logits", logits), topk, vocabulary, route_scale
    return (ids, weights), [logits, bias, tid2eid, tokens, ids, weights, *numbers]


def _check(name: str, arg: str, x: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if x is not None and (x.dtype != dtype or x.shape != shape):
        raise KernelError(f"{name}: '{arg}' is {list(x.shape)} {x.dtype}; expected {list(shape)} {dtype}")
