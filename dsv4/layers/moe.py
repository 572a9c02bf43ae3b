"""The feed-forward part of a layer: router, routed experts and the shared expert."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dsv4.config import LayerSpec, ModelConfig
from dsv4.kernels.ffn_inputs.ffn_inputs import ffn_inputs
from dsv4.kernels.linear.linear import linear
from dsv4.kernels.linear.operand import Projection, linear_operand
from dsv4.kernels.moe.moe import moe
from dsv4.kernels.moe.operand import experts_operand
from dsv4.layers.scope import Scope
from dsv4.layers.settings import Settings
from dsv4.layers.step import Given, Step
from dsv4.parallel.exchange import dispatch


class MoE:
    """`layers.L.ffn`. Hash layers take the experts from `tid2eid`; the learned scores weigh them in every layer."""

    def __init__(self, scope: Scope, config: ModelConfig, spec: LayerSpec, settings: Settings):
        act, tp = settings.act, settings.tp
        self.ranks = tp if tp is not None and tp.experts == "ep-a2a" else None
        self.every_expert = config.n_routed_experts
        first = 0 if tp is None else tp.share.experts(self.every_expert).start
        self.bias = None if spec.hash else scope.f32("gate.bias")
        self.tid2eid = scope.tensor("gate.tid2eid").long() if spec.hash else None
        self.topk, self.route_scale = config.num_experts_per_tok, config.routed_scaling_factor
        self.limit = config.swiglu_limit
        stacks = (scope.weight(f"experts.{name}") for name in ("w1", "w2", "w3"))
        self.experts = experts_operand(*stacks, act=act, first=first)
        gate = Projection(scope.weight("gate"), plain=True, f32=True)
        self.in_proj = linear_operand(
            gate, scope.weight("shared_experts.w1"), scope.weight("shared_experts.w3"), act=act
        )
        shared_w2 = Projection(scope.weight("shared_experts.w2"), f32=tp is not None)
        self.shared_w2 = linear_operand(shared_w2, act=act)

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """x [T, D], normed -> [T, D], or of several ranks this one's part of it in f32."""
        given, named = self.routing_of(linear(x, self.in_proj), step)
        ids, weights, activated = ffn_inputs(*given, **named)
        (shared,) = linear(activated, self.shared_w2)
        if self.ranks is None or not step.plan.segments:  # a step at fixed shapes cannot wait for the host
            return moe(x, self.experts, ids, weights, shared, limit=self.limit)
        rows, x = dispatch(x, ids, self.every_expert, self.ranks)
        part = moe(x, self.experts, ids[rows], weights[rows], shared[rows], limit=self.limit)
        return shared.index_copy_(0, rows, part)

    def routing_of(self, projected: Sequence[Tensor], step: Step) -> Given:
        """What ffn_inputs takes, of what in_proj gave."""
        how = {"topk": self.topk, "route_scale": self.route_scale, "limit": self.limit}
        return (*projected, self.bias, self.tid2eid, step.plan.tokens), how
