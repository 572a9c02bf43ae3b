"""What every layer needs to know of the step at hand."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dsv4.config import LayerSpec, ModelConfig
from dsv4.kvcache import Plan
from dsv4.kvcache.layout import CompressedKind
from dsv4.layers.rotary import cis, frequencies

RopeKey = tuple[float, object]


class Rotaries:
    """The frequency tables of a model: one per distinct (theta, YaRN) of its layers."""

    def __init__(self, config: ModelConfig, device: str):
        keys = {rope_key(spec): spec for spec in config.layers}
        self.freqs = {
            key: frequencies(spec.rope_theta, config.qk_rope_head_dim, spec.yarn).to(device)
            for key, spec in keys.items()
        }
        self.kinds = {(spec.kind, spec.ratio): rope_key(spec) for spec in config.layers if spec.ratio}

    def step(self, plan: Plan) -> Step:
        tokens = {key: cis(plan.positions, freqs) for key, freqs in self.freqs.items()}
        back = {key: turn.conj_physical() for key, turn in tokens.items()}
        entries = {
            kind: cis(plan.compressed[kind].compress.entry_positions, self.freqs[key])
            for kind, key in self.kinds.items()
        }
        return Step(plan, tokens, back, entries)


def rope_key(spec: LayerSpec) -> RopeKey:
    return spec.rope_theta, spec.yarn


@dataclass(frozen=True)
class Step:
    """Row numbers and rotations of one step; layers read it and change nothing in it."""

    plan: Plan
    token_cis: dict[RopeKey, Tensor]  # [T, R/2] complex64 at each token's position
    back_cis: dict[RopeKey, Tensor]  # their conjugates
    entry_cis: dict[CompressedKind, Tensor]  # [Ne, R/2] at each completed entry's first token

    def cis(self, spec: LayerSpec) -> Tensor:
        return self.token_cis[rope_key(spec)]

    def cis_back(self, spec: LayerSpec) -> Tensor:
        return self.back_cis[rope_key(spec)]
