"""Muon for the matrices, AdamW for the rest; learning rates are tensors, so that a captured CUDA graph sees their
changes."""

from __future__ import annotations

import torch
from model import Nano
from torch import Tensor, nn

ADAM_MATRICES = ("embed.", "head.weight", "gate.weight", "weights_proj", "hc_", "ape", "wgate")


def orthogonalise(g: Tensor) -> Tensor:
    """Newton-Schulz iteration toward the nearest semi-orthogonal matrix, batched [..., N, K], in bfloat16."""
    x = g.to(torch.bfloat16)
    flip = x.shape[-2] > x.shape[-1]
    x = x.transpose(-1, -2) if flip else x
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(x.dtype)
    for _ in range(5):
        a = x @ x.transpose(-1, -2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.transpose(-1, -2) if flip else x).float()


class Optimizer:
    """step() after backward; set_lr() before. Gradients are clipped to a global norm of 1."""

    def __init__(self, model: Nano, muon_lr: float, adam_lr: float, decay: float = 0.1) -> None:
        named = list(model.named_parameters())
        muon = [(n, p) for n, p in named if p.dim() >= 2 and not any(k in n for k in ADAM_MATRICES)]
        chosen = {n for n, _ in muon}
        rest = [(n, p) for n, p in named if n not in chosen]
        device = named[0][1].device
        self.params = [p for _, p in named]
        self.peak = (muon_lr, adam_lr)
        self.lr = (torch.tensor(muon_lr, device=device), torch.tensor(adam_lr, device=device))
        self.decay = decay
        self.groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for n, p in muon:
            key = (
                (-1, p.shape[-2] // 2, p.shape[-1]) if "wo_a" in n else (-1, *p.shape[-2:])
            )  # wo_a: one matrix per group
            self.groups.setdefault(key, []).append(p)
        self.momentum = {key: torch.zeros_like(self._stack(key, ps)) for key, ps in self.groups.items()}
        fused = device.type == "cuda"
        self.adam = torch.optim.AdamW(
            [
                {
                    "params": [p for n, p in rest if p.dim() >= 2 and "hc_" not in n and "ape" not in n],
                    "weight_decay": decay,
                },
                {"params": [p for n, p in rest if p.dim() < 2 or "hc_" in n or "ape" in n], "weight_decay": 0.0},
            ],
            lr=self.lr[1],
            betas=(0.9, 0.97),
            eps=1e-10,
            fused=fused,
            capturable=fused,
        )

    @staticmethod
    def _stack(key: tuple[int, ...], tensors: list) -> Tensor:
        return torch.cat([t.detach().reshape(key) for t in tensors])

    def set_lr(self, factor: float) -> None:
        for lr, peak in zip(self.lr, self.peak, strict=True):
            lr.fill_(peak * factor)

    @torch.no_grad()
    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True)
        for key, params in self.groups.items():
            grad = self._stack(key, [p.grad for p in params])
            momentum = self.momentum[key].lerp_(grad, 0.05)
            update = orthogonalise(grad.lerp(momentum, 0.95)) * (0.2 * max(key[-2:]) ** 0.5)
            at = 0
            for p in params:
                n = p.numel() // (key[-2] * key[-1])
                p.mul_(1 - self.lr[0] * self.decay).sub_(update[at : at + n].reshape(p.shape) * self.lr[0])
                at += n
        self.adam.step()

    def state_dict(self) -> dict[str, object]:
        return {"adam": self.adam.state_dict(), "momentum": self.momentum}
