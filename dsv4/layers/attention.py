"""Attention of one layer: low-rank queries, one shared key/value, window and compressed entries, grouped output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.config import LayerSpec, ModelConfig
from dsv4.kernels.attn_inputs.attn_inputs import attn_inputs
from dsv4.kernels.grouped_linear.grouped_linear import grouped_linear
from dsv4.kernels.grouped_linear.operand import grouped_operand
from dsv4.kernels.linear.launch import follows
from dsv4.kernels.linear.linear import linear
from dsv4.kernels.linear.operand import Projection, linear_operand
from dsv4.kernels.sparse_attention.sparse_attention import sparse_attention
from dsv4.kvcache.cache import LayerCache
from dsv4.layers.compressor import Compressor
from dsv4.layers.indexer import Indexer
from dsv4.layers.scope import Scope
from dsv4.layers.settings import Settings
from dsv4.layers.step import Given, Step


class Attention:
    """`layers.L.attn`. Kinds: window only; HCA adds every visible entry of its compressor; CSA those its indexer
    picks.
    """

    def __init__(self, scope: Scope, config: ModelConfig, spec: LayerSpec, settings: Settings):
        self.spec, self.head_dim, self.eps = spec, config.head_dim, config.rms_norm_eps
        self.kv_quant = settings.kv_quant
        self.window = config.sliding_window if settings.dtype == torch.float32 else 0
        act = settings.act
        self.wq_b = linear_operand(scope.weight("wq_b"), act=act)
        wo_a, wo_b = scope.weight("wo_a"), scope.weight("wo_b")
        self.wo_a = grouped_operand(wo_a, wo_a.shape[0] // config.o_lora_rank, act=act)
        self.wo_b = linear_operand(Projection(wo_b, f32=settings.tp is not None), act=act)
        self.q_norm, self.kv_norm = scope.f32("q_norm.weight"), scope.f32("kv_norm.weight")
        self.sink = scope.f32("attn_sink")
        self.heads = len(self.sink)  # those of this rank
        inputs = [Projection(scope.weight("wq_a")), Projection(scope.weight("wkv"))]
        pooled: list[str] = []
        if spec.kind != "window":
            pooled += ["compressor.wkv", "compressor.wgate"]
            self.compressor = Compressor(scope.at("compressor"), config, spec, settings, index=False)
        if spec.kind == "csa":
            pooled += ["indexer.compressor.wkv", "indexer.compressor.wgate", "indexer.weights_proj"]
            self.indexer = Indexer(scope.at("indexer"), config, spec, settings)
        self.in_proj = linear_operand(
            *inputs, *(Projection(scope.weight(n), plain=True, f32=True) for n in pooled), act=act
        )
        follows(self.wo_b, self.wo_a)
        self.queries = self.wq_b  # and on a GPU those of the indexer, which have the same input
        if spec.kind == "csa" and self.wq_b.launcher is not None:
            self.queries = linear_operand(*self.wq_b.projections, *self.indexer.wq_b.projections, act=act)

    def __call__(self, x: Tensor, cache: LayerCache, step: Step) -> Tensor:
        """x [T, D], normed -> [T, D], or of several ranks this one's part of it in f32. Appends the step's entries to
        `cache`.

        In float32, the dtype for comparisons, a decode step sums over a whole window even while it is short, as
        DeepSeek's code does: the zeros behind it change the last bit of a vectorised sum.
        """
        window = step.plan.window
        qr, kv, *pooled = linear(x, self.in_proj)
        ring = cache.ring.view(-1, cache.ring.shape[-1])
        before = None if window.in_ring else ring[window.history]
        given, named = self.inputs_of(qr, kv, pooled, cache, step)
        qr, entry = attn_inputs(*given, **named)
        scored = self.spec.kind == "csa" and self.indexer.scores(step)
        q, *index_q = linear(qr, self.queries if scored else self.wq_b)
        local = cache.ring if before is None else torch.cat([before, entry])
        rows = window.rows
        if window.in_ring and rows.shape[1] < self.window:
            rows = torch.nn.functional.pad(rows, (0, self.window - rows.shape[1]), value=-1)

        picked = self.indexer(qr, pooled[-1], cache, step, *index_q) if scored else None
        given, named = self.attention_of(q, local, rows, picked, cache, step)
        o = sparse_attention(*given, **named)
        (out,) = linear(grouped_linear(o.flatten(1), self.wo_a), self.wo_b)
        return out

    def inputs_of(self, qr: Tensor, kv: Tensor, pooled: Sequence[Tensor], cache: LayerCache, step: Step) -> Given:
        """What attn_inputs takes. pooled: what the input projections gave for the compressor and, in CSA, for the
        indexer's.
        """
        window, made = step.plan.window, []
        if self.spec.kind != "window":
            made.append(self.compressor(pooled[0], pooled[1], cache.state, cache.pool, step))
        if self.spec.kind == "csa":
            made.append(self.indexer.compressor(pooled[2], pooled[3], cache.index_state, cache.index_pool, step))
        written = step.cis(self.spec), cache.ring, window.write_rows, window.write_to, made
        return (qr, self.q_norm, kv, self.kv_norm, *written), {"eps": self.eps, "quantize": self.kv_quant}

    def attention_of(
        self, q: Tensor, local: Tensor, rows: Tensor, picked: Tensor | None, cache: LayerCache, step: Step
    ) -> Given:
        """What sparse_attention takes: wq_b's output, the window's entries and each token's rows of them, and the pool
        rows that the indexer picked; None: all.
        """
        pool = pool_rows = None
        if self.spec.kind != "window":
            pool, pool_rows = cache.pool, picked
            if picked is None:
                pool_rows = step.plan.compressed[self.spec.kind, self.spec.ratio].all_rows
        heads = q.unflatten(-1, (self.heads, self.head_dim))
        seen = local, rows, pool, pool_rows, self.sink, step.cis_back(self.spec)
        return (heads, *seen), {"scale": self.head_dim**-0.5, "turn": step.cis(self.spec), "eps": self.eps}
