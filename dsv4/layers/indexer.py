"""The lightning indexer of a CSA layer: which compressed entries a token attends to."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.config import LayerSpec, ModelConfig
from dsv4.kernels.index_topk.index_topk import index_topk
from dsv4.kernels.linear.linear import linear
from dsv4.kernels.linear.operand import linear_operand
from dsv4.kvcache.cache import LayerCache
from dsv4.layers.compressor import Compressor
from dsv4.layers.scope import Scope
from dsv4.layers.settings import Settings
from dsv4.layers.step import Given, Step


class Indexer:
    def __init__(self, scope: Scope, config: ModelConfig, spec: LayerSpec, settings: Settings):
        self.spec, self.heads, self.topk = spec, config.index_n_heads, config.index_topk
        self.wq_b = linear_operand(scope.weight("wq_b"), act=settings.act)
        self.compressor = Compressor(scope.at("compressor"), config, spec, settings, index=True)
        self.scale = config.index_head_dim**-0.5 * config.index_n_heads**-0.5
        self.quantize, self.keep_order = settings.index_quant, settings.dtype == torch.float32
        compared = "torch" if settings.act == "fp8" else "score"  # fp8: the settings of DeepSeek's own script
        self.order = compared if self.keep_order else "entry"

    def scores(self, step: Step) -> bool:
        """Whether a step's entries are scored, or all are taken. All while every visible one would be picked, except in
        float32, the dtype for comparisons: there attention adds the entries up in the order of their scores, as
        DeepSeek does.
        """
        most = step.plan.compressed[self.spec.kind, self.spec.ratio].most_visible
        return most > (0 if self.keep_order else self.topk)

    def __call__(
        self, qr: Tensor, head_weights: Tensor, cache: LayerCache, step: Step, q: Tensor | None = None
    ) -> Tensor:
        """qr [T, q_lora_rank] (after q_norm), head_weights [T, Hi] f32 -> pool rows [T, <= index_topk] i64. The step's
        index keys are in the cache. q: wq_b's product with qr, where it has been made.
        """
        if q is None:
            (q,) = linear(qr, self.wq_b)
        given, named = self.selection_of(q, head_weights, cache, step)
        picked = index_topk(*given, **named)
        most = step.plan.compressed[self.spec.kind, self.spec.ratio].most_visible
        return picked[:, :most] if self.keep_order else picked  # no sums over what is not there

    def selection_of(self, q: Tensor, head_weights: Tensor, cache: LayerCache, step: Step) -> Given:
        """What index_topk takes."""
        rows = step.plan.compressed[self.spec.kind, self.spec.ratio]
        queries = q.unflatten(-1, (self.heads, -1)), step.cis(self.spec), head_weights
        entries = cache.index_pool, rows.pages, rows.sequence, rows.visible
        return (*queries, *entries, self.topk, self.order, self.scale), {"quantize": self.quantize}
