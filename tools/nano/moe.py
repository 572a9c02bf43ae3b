"""Mixture of experts of SPEC 2.10, all experts at once: the router's zeros select. Right for 8 small experts,
wasteful beyond.

Shapes: x [B, T, D]; weights per token and expert [B, T, E], zero where not selected.
"""

from __future__ import annotations

import fakequant as fq
import torch
import torch.nn.functional as F
from attention import Linear
from fakequant import Quant
from fuse import fused
from torch import Tensor, nn


class Gate(nn.Module):
    """Router: score-routed layers add `bias` for the choice only; the hash layer looks its experts up by token id."""

    def __init__(self, config: dict, hashed: bool) -> None:
        super().__init__()
        self.e, self.k, self.scale = (
            config["n_routed_experts"],
            config["num_experts_per_tok"],
            config["routed_scaling_factor"],
        )
        self.weight = nn.Parameter(torch.randn(self.e, config["hidden_size"]) * config["hidden_size"] ** -0.5)
        self.hashed = hashed
        if hashed:
            generator = torch.Generator().manual_seed(0)
            table = torch.stack(
                [torch.randperm(self.e, generator=generator)[: self.k] for _ in range(config["vocab_size"])]
            )
            self.register_buffer("tid2eid", table)
        else:
            self.register_buffer("bias", torch.zeros(self.e))
        self.register_buffer("load", torch.zeros(self.e), persistent=False)  # share of the choices in the last batch

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Expert weights [B, T, E], and the sequence balance loss (zero in the hash layer)."""
        scores = torch.sqrt(F.softplus(F.linear(x.float(), self.weight)))
        chosen = self.tid2eid[ids] if self.hashed else (scores.detach() + self.bias).topk(self.k, -1).indices
        mask = torch.zeros_like(scores).scatter_(-1, chosen, 1.0)
        picked = scores * mask
        weights = picked / picked.sum(-1, keepdim=True) * self.scale
        balance = scores.new_zeros(())
        if self.training:
            self.load.copy_(mask.mean((0, 1)) / self.k)
            if not self.hashed:
                share = scores / scores.sum(-1, keepdim=True)
                balance = (mask.mean(1) * self.e / self.k * share.mean(1)).sum(-1).mean()
        return weights, balance

    @torch.no_grad()
    def update_bias(self, rate: float) -> None:
        if not self.hashed:
            self.bias.add_(torch.sign(1.0 / self.e - self.load), alpha=rate)


class Experts(nn.Module):
    """Routed experts w1 (gate), w3 (up) [E, I, D] and w2 (down) [E, D, I]."""

    def __init__(self, config: dict, kind: str) -> None:
        super().__init__()
        e, i, d = config["n_routed_experts"], config["moe_intermediate_size"], config["hidden_size"]
        self.w1 = nn.Parameter(torch.randn(e, i, d) * d**-0.5)
        self.w2 = nn.Parameter(torch.randn(e, d, i) * (0.4 * i**-0.5))
        self.w3 = nn.Parameter(torch.randn(e, i, d) * d**-0.5)
        self.kind, self.limit = kind, config["swiglu_limit"]

    def forward(self, x: Tensor, weights: Tensor, quant: Quant) -> Tensor:
        w1, w2, w3 = (w.to(x.dtype) for w in fq.expert_weights(self.w1, self.w2, self.w3, self.kind, quant))
        x = fq.activation(x, self.kind, quant)
        g, u = F.linear(x, w1.flatten(0, 1)), F.linear(x, w3.flatten(0, 1))
        a = swiglu(
            *(v.view(-1, w1.shape[0], w1.shape[1]) for v in (g, u)), weights.flatten(0, 1).unsqueeze(-1), self.limit
        )
        a = fq.activation(
            a.unflatten(0, x.shape[:2]), self.kind, quant
        )  # one group of 128 is one expert's input, as when run one by one
        return F.linear(a.flatten(-2), w2.transpose(0, 1).flatten(1))


class SharedExpert(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        d, i = config["hidden_size"], config["moe_intermediate_size"]
        self.w1, self.w2, self.w3 = Linear(i, d), Linear(d, i, gain=0.4), Linear(i, d)
        self.limit = config["swiglu_limit"]

    def forward(self, x: Tensor, quant: Quant) -> Tensor:
        g, u = (linear(x, quant).flatten(0, 1) for linear in (self.w1, self.w3))
        return self.w2(swiglu(g, u, None, self.limit).unflatten(0, x.shape[:2]), quant)


@fused
def swiglu(g: Tensor, u: Tensor, weight: Tensor | None, limit: float) -> Tensor:
    """weight * silu(g) * u in float32, rounded once."""
    a = F.silu(g.float().clamp(max=limit)) * u.float().clamp(-limit, limit)
    return (a if weight is None else a * weight).to(g.dtype)


class MoE(nn.Module):
    def __init__(self, config: dict, hashed: bool, kind: str) -> None:
        super().__init__()
        self.gate = Gate(config, hashed)
        self.experts = Experts(config, kind)
        self.shared_experts = SharedExpert(config)

    def forward(self, x: Tensor, ids: Tensor, quant: Quant) -> tuple[Tensor, Tensor]:
        weights, balance = self.gate(x, ids)
        y = self.experts(x, weights, quant).float() + self.shared_experts(x, quant).float()
        return y.to(x.dtype), balance
