"""What every layer needs to know of the step at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4.config import LayerSpec, ModelConfig
from dsv4.kvcache import KVCache, Plan, StaticPlan
from dsv4.kvcache.layout import CompressedKind
from dsv4.layers.rotary import cis, frequencies

RopeKey = tuple[float, object]
Given = tuple[tuple[Any, ...], dict[str, Any]]  # what an op takes, by place and by name


class Rotaries:
    """The frequency tables of a model: one per distinct (theta, YaRN) of its layers."""

    def __init__(self, config: ModelConfig, device: str):
        specs = {rope_key(spec): spec for spec in config.layers}
        rows = [frequencies(spec.rope_theta, config.qk_rope_head_dim, spec.yarn) for spec in specs.values()]
        self.freqs = torch.stack(rows).to(device)
        self.places = {key: place for place, key in enumerate(specs)}
        self.kinds = {(spec.kind, spec.ratio): self.places[rope_key(spec)] for spec in config.layers if spec.ratio}

    def step(self, plan: Plan) -> Step:
        turns = cis(plan.positions, self.freqs)
        back = turns.conj_physical()
        entries = {}
        for kind, place in self.kinds.items():
            positions = plan.compressed[kind].compress.entry_positions
            entries[kind] = cis(positions, self.freqs[place : place + 1])[0] if len(positions) else turns[0, :0]
        return Step(plan, self.places, turns, back, entries)

    def static(self, cache: KVCache, batch: int, max_length: int) -> tuple[StaticPlan, Step]:
        """A decode step of `batch` rows at fixed shapes: what its `update` fills, the Step that layers run on shows."""
        static = StaticPlan(cache, batch, max_length, self.freqs, self.kinds)
        return static, Step(static.plan, self.places, static.token_cis, static.back_cis, static.entry_cis)


def rope_key(spec: LayerSpec) -> RopeKey:
    return spec.rope_theta, spec.yarn


@dataclass(frozen=True)
class Step:
    """Row numbers and rotations of one step; layers read it and change nothing in it."""

    plan: Plan
    places: dict[RopeKey, int]  # row of each (theta, YaRN) in the two below
    token_cis: Tensor  # [n, T, R/2] complex64 at each token's position
    back_cis: Tensor  # their conjugates
    entry_cis: dict[CompressedKind, Tensor]  # [Ne, R/2] at each completed entry's first token

    def cis(self, spec: LayerSpec) -> Tensor:
        return self.token_cis[self.places[rope_key(spec)]]

    def cis_back(self, spec: LayerSpec) -> Tensor:
        return self.back_cis[self.places[rope_key(spec)]]
