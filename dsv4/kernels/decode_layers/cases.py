"""Cases of decode_layers: programs of two small layers against the ops that they are made of, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.attn_inputs.attn_inputs import attn_inputs
from dsv4.kernels.attn_inputs.cases import compression
from dsv4.kernels.case import EPS, Case, Maker, bits
from dsv4.kernels.compress.cases import KINDS, decode_rows
from dsv4.kernels.decode_layers.decode_layers import decode_layers
from dsv4.kernels.decode_layers.phases import Attention, Experts, Index, Inputs, Linear, Phase, Product, Seam
from dsv4.kernels.decode_layers.program import Program
from dsv4.kernels.ffn_inputs.ffn_inputs import ffn_inputs
from dsv4.kernels.grouped_linear.grouped_linear import grouped_linear
from dsv4.kernels.grouped_linear.operand import GroupedOperand, grouped_operand
from dsv4.kernels.index_topk.cases import inputs as index_inputs
from dsv4.kernels.index_topk.index_topk import index_topk
from dsv4.kernels.linear.cases import weight
from dsv4.kernels.linear.linear import linear
from dsv4.kernels.linear.operand import LinearOperand, Projection, linear_operand
from dsv4.kernels.mhc_seam.cases import arguments as seam_arguments
from dsv4.kernels.mhc_seam.mhc_seam import mhc_seam
from dsv4.kernels.moe.cases import Size, operand_of
from dsv4.kernels.moe.moe import moe
from dsv4.kernels.sparse_attention.cases import inputs as attention_inputs
from dsv4.kernels.sparse_attention.sparse_attention import sparse_attention

WIDTH, QUERY, HEADS, HEAD, GROUPS, RANK = 512, 320, 8, 512, 2, 96
INDEX_HEADS, INDEX_WIDTH, TOPK, SEEN = 8, 128, 64, (300, 64, 77, 128, 5, 200, 0, 129)
LONG, SHORT = 1500, 300  # entries of a row where nothing is selected
EXPERTS = Size("small", 8, WIDTH, 256, 2, ())
NORMS = {"sinkhorn_iters": 20, "hc_eps": 1e-6, "norm_eps": EPS}


class Small:
    """Phases of a layer where nothing is selected and a CSA layer, of random weights, and all tensors that they write.
    short: the first has rows of SHORT, else of LONG. entries: of the CSA layer's rows if longer than SEEN's, which then
    share their pages; alike: which all have the same keys.
    """

    def __init__(
        self,
        make: Maker,
        rows: int,
        padding: int,
        format: str,
        *,
        short: bool = False,
        entries: int = 0,
        alike: bool = False,
    ):
        self.make, self.rows, self.padding, self.format = make, rows, padding, format
        self.short, self.entries, self.alike = short, entries, alike
        self.phases: list[Phase] = []
        self.written: list[Tensor] = []
        self.y, self.streams = make.normal(rows, WIDTH, dtype="bf16"), self._streams()
        self.h = self.streams[0]
        self._attention(csa=False)
        self._experts(hashed=True)
        self._attention(csa=True)
        self._experts(hashed=False)
        self.program = Program(self.phases, self.h, self.y)

    def _room(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        self.written.append(torch.zeros((self.rows, *shape), dtype=dtype, device=self.make.device))
        return self.written[-1]

    def _streams(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        _, h, post, comb, *_ = seam_arguments(self.make, self.rows, WIDTH, "bf16", "bf16")
        found = h, self.make.normal(self.rows, WIDTH, dtype="bf16"), post, comb
        self.written += found
        return found

    def _seam(self) -> None:
        before, after = self.streams, self._streams()
        site = seam_arguments(self.make, self.rows, WIDTH, "bf16", "bf16")[4:]
        self.phases.append(Seam((self.y, before[0], *before[2:], *site), {**NORMS, "peers": None}, after))
        self.streams = after

    def _operand(self, k: int, *rows: int, plain: tuple[int, ...] = ()) -> LinearOperand:
        quantised = [Projection(weight(self.make, self.format, n, k)) for n in rows]
        others = [Projection(weight(self.make, "bf16", n, k), plain=True, f32=True) for n in plain]
        return linear_operand(*quantised, *others, act="bf16")

    def _product(self, x: Tensor, operand: LinearOperand) -> Product:
        sizes = [(p.weight.shape[0], torch.float32 if p.f32 else torch.bfloat16) for p in operand.projections]
        return Product(x, operand, tuple(self._room(n, dtype=dtype) for n, dtype in sizes))

    def _attention(self, *, csa: bool) -> None:
        make, rows, live = self.make, self.rows, self.rows - self.padding
        if csa:
            self._seam()
        kinds = [KINDS[0], KINDS[2]] if csa else []
        pooled = [n for kind in kinds for n in (kind.channels, kind.channels)] + ([INDEX_HEADS] if csa else [])
        into = self._product(self.streams[1], self._operand(WIDTH, QUERY, HEAD, plain=tuple(pooled)))
        qr, kv, *rest = into.out
        selected = 64 if csa else SHORT if self.short else LONG
        _, ring, local, pool, picked, sink, turn = attention_inputs(
            make, rows, HEADS, 100, selected, packed=(True, True)
        )
        write_to = local[:, 70].clone()
        local[live:], write_to[live:], picked[live:], picked[:, 600 + 200 * live :] = -1, -1, -1, -1
        made = []
        for place, kind in enumerate(kinds):
            numbers = decode_rows(kind, [7 + 5 * b for b in range(rows)], self.padding, False, make)
            one = compression(make, kind, numbers, "bf16", "packed")
            made.append(one._replace(u=rest[2 * place], g=rest[2 * place + 1]))
            self.written += one.state, one.pool
        self.written.append(ring)
        normed, entry = self._room(QUERY), self._room(ring.shape[-1], dtype=torch.uint8)
        every = torch.arange(rows, device=make.device)
        given = qr, make.normal(QUERY), kv, make.normal(HEAD), turn, ring, every, write_to, made
        queries = self._product(normed, self._operand(QUERY, HEADS * HEAD))
        self.phases += [Linear((into,)), Inputs(given, {"eps": EPS, "quantize": True}, (normed, entry))]
        if csa:
            cis, keys = self._long_keys() if self.entries else self._keys()
            pool = pool[torch.arange(len(keys[0]), device=make.device) % len(pool)]
            index = self._product(normed, self._operand(QUERY, INDEX_HEADS * INDEX_WIDTH))
            picked = self._room(TOPK, dtype=torch.int64)
            asked = index.out[0].unflatten(1, (INDEX_HEADS, INDEX_WIDTH)), cis, rest[-1]
            chosen = *asked, *keys, TOPK, "entry", INDEX_WIDTH**-0.5
            self.phases += [Linear((queries, index)), Index(chosen, {"quantize": True}, (picked,))]
        else:
            self.phases.append(Linear((queries,)))
        o, low = self._room(HEADS, HEAD), self._room(GROUPS * RANK)
        seen_by = queries.out[0].unflatten(1, (HEADS, HEAD)), ring, local, pool, picked, sink
        named = {"scale": HEAD**-0.5, "turn": turn, "eps": EPS}
        self.phases.append(Attention((*seen_by, turn.conj_physical()), named, (o,)))
        wo_a = grouped_operand(weight(make, self.format, GROUPS * RANK, HEADS * HEAD // GROUPS), GROUPS, act="bf16")
        wo_b = self._operand(GROUPS * RANK, WIDTH)
        self.phases += [Linear((Product(o.flatten(1), wo_a, (low,)),)), Linear((Product(low, wo_b, (self.y,)),))]

    def _keys(self) -> tuple[Tensor, list[Tensor]]:
        """Rotations; keys, pages, sequence and visible of index_topk."""
        live = self.rows - self.padding
        sequence = [b if b < live else -1 for b in range(self.rows)]
        seen = [SEEN[b] if b < live else 0 for b in range(self.rows)]
        _, cis, _, *keys = index_inputs(self.make, INDEX_HEADS, 5, sequence, seen, exact=False, packed=True)
        return cis, keys

    def _long_keys(self) -> tuple[Tensor, list[Tensor]]:
        most, rows, live = self.entries, self.rows, self.rows - self.padding
        count = -(-most // 64)
        _, _, _, keys, pages, *_ = index_inputs(self.make, INDEX_HEADS, count, [0], [most], exact=False, packed=True)
        if self.alike:
            keys[2:] = keys[1]
        every = torch.arange(rows, device=self.make.device)
        seen = [most, most // 2, TOPK, most - 700, 5, TOPK + 1, 0, most - 1]
        visible = torch.tensor(seen[:rows], device=self.make.device)
        cis = index_inputs(self.make, INDEX_HEADS, 1, [0] * rows, [0] * rows, exact=False, packed=True)[1]
        sequence = every.masked_fill(every >= live, -1)
        return cis, [keys, pages.expand(rows, -1).contiguous(), sequence, visible.masked_fill(every >= live, 0)]

    def _experts(self, *, hashed: bool) -> None:
        make, inner = self.make, EXPERTS.inner
        self._seam()
        gate = Projection(weight(make, "bf16", EXPERTS.experts, WIDTH), plain=True, f32=True)
        both = [weight(make, self.format, inner, WIDTH) for _ in range(2)]
        into = self._product(self.streams[1], linear_operand(gate, *both, act="bf16"))
        bias = None if hashed else make.normal(EXPERTS.experts)
        table = make.uniform(50, EXPERTS.experts).topk(EXPERTS.topk).indices if hashed else None
        self.written = [x for x in self.written if x is not into.out[0]]  # the router is told its logits
        given = *into.out, bias, table, make.integers(0, 50, self.rows)
        how = {"topk": EXPERTS.topk, "route_scale": 1.5, "limit": 10.0}
        shared = self._operand(inner, WIDTH)
        experts = Experts(given, how, self.streams[1], shared, operand_of(make, EXPERTS), self.y)
        self.phases += [Linear((into,)), experts]


def chain(phase: Phase) -> None:
    """The launches of the ops."""
    if isinstance(phase, Linear):
        for product in phase.products:
            if isinstance(product.operand, GroupedOperand):
                grouped_linear(product.x, product.operand, out=product.out[0])
            else:
                linear(product.x, product.operand, out=product.out)
    elif isinstance(phase, Experts):
        ids, weights, activated = ffn_inputs(*phase.args, **phase.routing)
        (shared,) = linear(activated, phase.shared_w2)
        moe(phase.x, phase.experts, ids, weights, shared, limit=phase.routing["limit"], out=phase.out)
    else:
        op: Any = {Seam: mhc_seam, Inputs: attn_inputs, Index: index_topk, Attention: sparse_attention}[type(phase)]
        op(*phase.args, **phase.named, out=phase.out if len(phase.out) > 1 else phase.out[0])


def case(
    make: Maker, rows: int, padding: int, format: str, *, short: bool = False, entries: int = 0, alike: bool = False
) -> Case:
    """Everything that a program writes, of runs that start alike."""
    small = Small(make, rows, padding, format, short=short, entries=entries, alike=alike)
    watched = [small.y, *small.written]
    before = [x.clone() for x in watched]

    def ran(how: Callable[[], object]) -> Callable[..., tuple[Tensor, ...]]:
        def run(h: Tensor, out: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
            for x, first in zip(watched, before, strict=True):
                x.copy_(first)
            small.h.copy_(h)
            how()
            found = out or tuple(torch.empty_like(x) for x in watched)
            return tuple(to.copy_(x) for to, x in zip(found, watched, strict=True))

        return run

    def ops() -> None:
        for phase in small.phases:
            chain(phase)

    name = f"two layers, {format}, {rows} rows{' of few entries' if short else ''}, {padding} of padding"
    name += f", {entries} entries{' alike' if alike else ''}" if entries else ""
    launch = ran(lambda: decode_layers(small.h, small.program))
    return Case("decode_layers", name, "bf16", launch, ran(ops), (small.h.clone(),), bits, moved=small.program.nbytes)


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    short, long = [(1, 0, "nvfp4"), (8, 2, "nvfp4")], [(3, 1, "fp8")]
    if not quick:
        short += [(2, 0, "nvfp4"), (5, 0, "bf16")]
        long += [(1, 0, "fp8"), (2, 0, "nvfp4"), (5, 0, "bf16"), (8, 0, "fp8")]
    for rows, padding, format in short:
        yield case(make, rows, padding, format, short=True)
    for rows, padding, format in long:
        yield case(make, rows, padding, format)
    for rows, padding, entries, alike in [(1, 0, 8193, False), (3, 1, 9000, True)] + (
        []
        if quick
        else [
            (8, 2, 16384, False),
            (8, 0, 9000, True),
            (1, 0, 70000, False),
            (1, 0, 262144, True),
            (8, 1, 262144, False),
        ]
    ):
        yield case(make, rows, padding, "nvfp4", entries=entries, alike=alike)
