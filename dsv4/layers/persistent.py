"""All layers of a decode step as one op: the list of what the layers would call, on buffers of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.kernels.decode_layers.decode_layers import decode_layers
from dsv4.kernels.decode_layers.phases import Attention as AttentionPhase
from dsv4.kernels.decode_layers.phases import Experts, Index, Inputs, Linear, Phase, Product, Seam
from dsv4.kernels.decode_layers.program import ROWS, Program, Unfit
from dsv4.kernels.linear.operand import LinearOperand
from dsv4.kernels.op import twins_on_cuda
from dsv4.kvcache import KVCache
from dsv4.kvcache.cache import LayerCache
from dsv4.layers.attention import Attention
from dsv4.layers.mhc import Site, Streams
from dsv4.layers.moe import MoE
from dsv4.layers.settings import Settings
from dsv4.layers.step import Step


class Layer(Protocol):
    """A Block of dsv4/model.py."""

    attn_site: Site
    ffn_site: Site
    attn: Attention
    ffn: MoE


class Persistent:
    """What Model.body does between entering the first layer and leaving the last, for the rows of `step`, whose buffers
    stay where they are: bit for bit the same. Unfit where that cannot be.

    Layers use the same buffers one after the other; streams alternate between two, as a seam reads and writes them.
    """

    @torch.inference_mode(False)  # buffers made here are written to in either mode
    def __init__(self, layers: Sequence[Layer], cache: KVCache, step: Step, config: ModelConfig, settings: Settings):
        rows = len(step.plan.tokens)
        unfit = _unfit(layers[0], rows, settings, cache.device)
        if unfit is not None:
            raise Unfit(f"decode_layers: {unfit}")
        self._buffers: dict[tuple[Any, ...], Tensor] = {}
        self._rows, self._device, self._step, self._phases = rows, cache.device, step, list[Phase]()
        part = torch.bfloat16 if settings.tp is None else torch.float32
        width, mult = config.hidden_size, config.hc_mult
        x, self._y = self._room("x", width), self._room("y", width, dtype=part)
        both = [
            Streams(self._room(f"h{turn}", mult, width), x, *(self._room(f"{name}{turn}", *shape, dtype=torch.float32)
            for name, shape in (("post", (mult,)), ("comb", (mult, mult)))))
            for turn in range(2)
        ]  # fmt: skip
        self.entered = self._streams = both[0]
        self._other = both[1]
        for place, layer in enumerate(layers):
            if place > 0:
                self._seam(layer.attn_site)
            self._attention(layer.attn, cache.layers[place])
            self._seam(layer.ffn_site)
            self._experts(layer.ffn)
        self.program = Program(self._phases, self.entered.h, self._y)

    def __call__(self) -> tuple[Streams, Tensor]:
        """After `entered` was filled: the streams inside the last layer's FFN site, and the FFN's output."""
        return self._streams, decode_layers(self.entered.h, self.program)

    def _room(self, name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """A buffer of a name, the same each time."""
        key = name, shape, dtype
        if key not in self._buffers:
            self._buffers[key] = torch.zeros((self._rows, *shape), dtype=dtype, device=self._device)
        return self._buffers[key]

    def _products(self, name: str, x: Tensor, operand: LinearOperand) -> Product:
        rows = [(p.weight.shape[-2], torch.float32 if p.f32 else torch.bfloat16) for p in operand.projections]
        return Product(x, operand, tuple(self._room(f"{name}{i}", n, dtype=t) for i, (n, t) in enumerate(rows)))

    def _seam(self, site: Site) -> None:
        before, after = self._streams, self._other
        args, named = site.seam_of(self._y, before)
        self._phases.append(Seam(args, named, (after.h, after.x, after.post, after.comb)))
        self._streams, self._other = after, before

    def _attention(self, attn: Attention, cache: LayerCache) -> None:
        step, spec, add = self._step, attn.spec, self._phases.append
        inputs = self._products("in", self._streams.x, attn.in_proj)
        add(Linear((inputs,)))
        qr, kv, *pooled = inputs.out
        normed, entry = self._room("qr", qr.shape[1]), self._room("entry", cache.ring.shape[-1], dtype=cache.ring.dtype)
        args, named = attn.inputs_of(qr, kv, pooled, cache, step)
        add(Inputs(args, named, (normed, entry)))
        queries = self._products("q", normed, attn.wq_b)
        picked = None
        if spec.kind == "csa" and attn.indexer.scores(step):
            index_queries = self._products("index_q", normed, attn.indexer.wq_b)
            add(Linear((queries, index_queries)))
            args, named = attn.indexer.selection_of(index_queries.out[0], pooled[-1], cache, step)
            picked = self._room("picked", min(args[7], args[4].shape[1] * args[3].shape[1]), dtype=torch.int64)
            add(Index(args, named, (picked,)))
        else:
            add(Linear((queries,)))
        args, named = attn.attention_of(queries.out[0], cache.ring, step.plan.window.rows, picked, cache, step)
        o = self._room("o", attn.heads, attn.head_dim)
        add(AttentionPhase(args, named, (o,)))
        low = self._room("low", attn.wo_b.projections[0].weight.shape[-1])
        add(Linear((Product(o.flatten(1), attn.wo_a, (low,)),)))
        add(Linear((Product(low, attn.wo_b, (self._y,)),)))

    def _experts(self, ffn: MoE) -> None:
        x = self._streams.x
        inputs = self._products("ffn", x, ffn.in_proj)
        args, routing = ffn.routing_of(inputs.out, self._step)
        self._phases.append(Linear((inputs,)))
        self._phases.append(Experts(args, routing, x, ffn.shared_w2, ffn.experts, self._y))


def _unfit(layer: Layer, rows: int, settings: Settings, device: str) -> str | None:
    """Why a step of this model cannot be a program, before its sizes are looked at."""
    others = sorted(twins_on_cuda() - {"decode_layers"})
    if rows > ROWS:
        return f"{rows} rows; a program takes 1 to {ROWS}"
    if settings.dtype != torch.bfloat16 or settings.act != "bf16":
        return f"dtype {settings.dtype} and act '{settings.act}'; a program multiplies bfloat16 as it is"
    if settings.tp is not None and settings.tp.experts != "tp":
        return f"a rank has some of the experts ({settings.tp.experts}); a program takes some of each (tp)"
    if settings.tp is not None and layer.attn_site.peers is None:
        return "these ranks cannot write each other's memory"
    if others and device != "cpu":
        return f"DSV4_REF names {', '.join(others)}, which a program does not call"
    return None
