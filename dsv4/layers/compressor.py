"""The compressor of a CSA or HCA layer, or of a CSA layer's indexer."""

from __future__ import annotations

from torch import Tensor

from dsv4.config import LayerSpec, ModelConfig
from dsv4.kernels.compress.rows import Compression
from dsv4.layers.scope import Scope
from dsv4.layers.settings import Settings
from dsv4.layers.step import Step


class Compressor:
    """Pools windows of `ratio` tokens into entries and appends them to the cache; its projections are done by the
    caller.
    """

    def __init__(self, scope: Scope, config: ModelConfig, spec: LayerSpec, settings: Settings, *, index: bool):
        self.kind = (spec.kind, spec.ratio)
        self.ape = scope.f32("ape")
        self.norm = scope.f32("norm.weight")
        self.eps, self.dtype, self.index = config.rms_norm_eps, settings.dtype, index
        self.quantize = settings.index_quant if index else settings.kv_quant

    def __call__(self, u: Tensor, g: Tensor, state: Tensor, pool: Tensor, step: Step) -> Compression:
        """u, g [T, C] f32: `wkv` and `wgate` of the layer's input. What the op takes; attn_inputs does it."""
        rows, cis = step.plan.compressed[self.kind].compress, step.entry_cis[self.kind]
        rest = self.eps, self.dtype, self.index, self.quantize
        return Compression(u, g, self.ape, self.norm, state, pool, rows, cis, *rest)
