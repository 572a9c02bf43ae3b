"""What bench_peer_kernels.py sets beside one another: projections and routed experts of V4-Flash as calls of ours
and of a peer, on the same values, with the exact result.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from dsv4.bench.kernels import COLD, MAX_COPIES
from dsv4.kernels.case import Maker, nbytes
from dsv4.kernels.linear.linear import linear
from dsv4.kernels.linear.operand import LinearOperand, linear_operand
from dsv4.kernels.moe.moe import moe
from dsv4.kernels.moe.operand import ExpertsOperand, experts_operand
from dsv4.quant.weights import NVFP4Weight

LIMIT = 10.0  # of SwiGLU
ROUTINGS = 16  # of the experts, that take turns

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Size:
    """Routed experts: E, D, F, K."""

    experts: int = 256
    width: int = 4096
    inner: int = 2048
    topk: int = 6


class Peer(Protocol):
    """A library of kernels. What it makes of weights is bound to its input: each result is a call for a graph."""

    name: str
    version: str

    def ready(self) -> None:
        """Wait for what was begun: nothing else is to run while graphs are captured and timed."""

    def linear(self, weight: NVFP4Weight, batches: Sequence[int]) -> Callable[[Tensor], Call]:
        """weight [N, K] -> x [B, K] -> a call that gives x @ weight^T [B, N]. It may compile for `batches`."""

    def experts(
        self, w13: NVFP4Weight, w2: NVFP4Weight, topk: int, limit: float, batches: Sequence[int]
    ) -> Callable[[Tensor, Tensor], Call]:
        """w13 [E, 2F, D], gate before up, and w2 [E, D, F] -> x [B, D], ids [B, K] -> a call that gives what each
        expert makes of its token [B * K, D], without weights; `limit` is SwiGLU's."""


@dataclass(frozen=True)
class Subject:
    """One op at one batch. bind: who -> calls that take weights in turn; exact and value: what a first call of `who`
    should give and gives, float64 [B, N]; nbytes: of one call."""

    op: str
    shape: str
    batch: int
    bind: dict[str, Callable[[], list[Call]]]
    exact: Tensor
    value: Callable[[Tensor], Tensor]
    nbytes: int


def nvfp4(make: Maker, *shape: int, scale: Tensor | None = None) -> NVFP4Weight:
    """All codes, block scales of 0.5 to 1.9, results of deviation about 1; `scale`: the global one, else one here."""
    *lead, rows, columns = shape
    codes = make.integers(0, 256, *lead, rows, columns // 2).to(torch.uint8)
    blocks = make.integers(0x30, 0x40, *lead, rows, columns // 16).to(torch.uint8).view(torch.float8_e4m3fn)
    if scale is None:
        scale = (make.uniform(*lead) + 0.5) * 0.3 * columns**-0.5
    return NVFP4Weight(codes, blocks, scale)


def copies(operand_bytes: int, l2: int) -> int:
    """How many weights take turns, that none is in L2 when its turn comes again."""
    return min(MAX_COPIES, math.ceil(COLD * l2 / operand_bytes))


def dense(
    make: Maker, peers: Sequence[Peer], shape: tuple[str, int, int], batches: Sequence[int], l2: int
) -> Callable[[], Iterator[Subject]]:
    """Starts what the peers compile; then the subjects of one projection."""
    op, columns, rows = shape
    weight = nvfp4(make, rows, columns)
    first = {peer.name: attempt(peer.linear, weight, batches) for peer in peers}

    def subjects() -> Iterator[Subject]:
        count, exact = copies(weight.nbytes, l2), weight.dequantize().double().T
        mine = [linear_operand(weight, act="bf16") for _ in range(count)]
        theirs = {
            peer.name: [first[peer.name], *(attempt(peer.linear, weight, batches) for _ in range(count - 1))]
            for peer in peers
        }
        for batch in batches:
            x = make.normal(batch, columns, dtype="bf16")
            bind = {"dsv4": partial(own_linears, x, mine)}
            bind |= {name: partial(their_linears, x, several) for name, several in theirs.items()}
            moved = weight.nbytes + nbytes(x) + batch * rows * x.element_size()
            yield Subject(op, f"{columns} -> {rows}", batch, bind, x.double() @ exact, Tensor.double, moved)

    return subjects


def own_linears(x: Tensor, operands: Sequence[LinearOperand]) -> list[Call]:
    def calling(operand: LinearOperand) -> Call:
        return lambda: linear(x, operand)[0]

    return [calling(operand) for operand in operands]


def their_linears(x: Tensor, several: Sequence[Any]) -> list[Call]:
    return [given(one)(x) for one in several]


def experts(make: Maker, peers: Sequence[Peer], size: Size, batches: Sequence[int]) -> Callable[[], Iterator[Subject]]:
    """Starts what the peers compile; then the subjects of the routed experts."""
    w1 = nvfp4(make, size.experts, size.inner, size.width)
    w3 = nvfp4(make, size.experts, size.inner, size.width, scale=w1.global_scale)
    w2 = nvfp4(make, size.experts, size.width, size.inner)
    w13 = NVFP4Weight(torch.cat([w1.codes, w3.codes], 1), torch.cat([w1.scale, w3.scale], 1), w1.global_scale)
    theirs = {peer.name: attempt(peer.experts, w13, w2, size.topk, LIMIT, batches) for peer in peers}
    mine = experts_operand(w1, w2, w3, act="bf16")

    def subjects() -> Iterator[Subject]:
        for batch in batches:
            x = make.normal(batch, size.width, dtype="bf16", scale=4)  # some of it is clamped
            shared = make.normal(batch, size.width, dtype="bf16")
            routing = Routing(
                [make.uniform(batch, size.experts).topk(size.topk).indices for _ in range(ROUTINGS)],
                make.uniform(batch, size.topk) + 0.1,
                shared,
            )
            bind = {"dsv4": partial(own_experts, x, mine, routing)}
            bind |= {name: partial(their_experts, x, one, routing) for name, one in theirs.items()}
            used = statistics.mean(len(ids.unique()) for ids in routing.turns) / size.experts
            moved = round((w13.nbytes + w2.nbytes) * used) + 2 * nbytes(x)
            shape = f"{size.topk} of {size.experts}, {size.width} x {size.inner}"
            exact = exact_experts(x, routing, w13, w2)
            yield Subject("experts", shape, batch, bind, exact, routing.summed, moved)

    return subjects


@dataclass(frozen=True)
class Routing:
    """turns: ids [B, K] of each; weights [B, K] f32; shared [B, D], what the shared expert gives."""

    turns: list[Tensor]
    weights: Tensor
    shared: Tensor

    def summed(self, result: Tensor) -> Tensor:
        """[B, D] float64, of ours or of what each expert made [B * K, D]."""
        if result.shape == self.shared.shape:
            return result.double()
        each = result.double().unflatten(0, self.weights.shape)
        return (each * self.weights.double().unsqueeze(-1)).sum(1) + self.shared.double()


def own_experts(x: Tensor, operand: ExpertsOperand, routing: Routing) -> list[Call]:
    def calling(ids: Tensor) -> Call:
        return lambda: moe(x, operand, ids, routing.weights, routing.shared, limit=LIMIT)

    return [calling(ids) for ids in routing.turns]


def their_experts(x: Tensor, made: Any, routing: Routing) -> list[Call]:
    return [given(made)(x, ids) for ids in routing.turns]


def exact_experts(x: Tensor, routing: Routing, w13: NVFP4Weight, w2: NVFP4Weight) -> Tensor:
    """The experts of the first turn in float64, one by one: -> [B, D]."""
    ids, result = routing.turns[0], routing.shared.double()
    for expert in ids.unique().tolist():
        tokens, places = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[tokens].double() @ w13.select(expert).dequantize().double().T).chunk(2, dim=-1)
        middle = gate.clamp(max=LIMIT) * gate.clamp(max=LIMIT).sigmoid() * up.clamp(-LIMIT, LIMIT)
        out = middle @ w2.select(expert).dequantize().double().T
        result.index_add_(0, tokens, out * routing.weights[tokens, places].double().unsqueeze(-1))
    return result


def attempt(function: Callable[..., Any], *args: Any) -> Any:
    """The result, or the exception: what a peer cannot make is said when its turn comes."""
    try:
        return function(*args)
    except Exception as failure:
        return failure


def given(made: Any) -> Any:
    if isinstance(made, Exception):
        raise made
    return made
