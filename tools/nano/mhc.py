"""Manifold-constrained hyper-connections (SPEC 2.3) over four residual streams h [B, T, 4, D]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import sinkhorn

M = 4


def read_coefficients(h: Tensor, fn: Tensor, eps: float) -> Tensor:
    """z [..., fn rows] float32: the flattened stream through fn, scaled by its unweighted RMS after the product."""
    v = h.flatten(-2).float()
    return (v @ fn.t()) * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)


class Site(nn.Module):
    """One attention or FFN site; official tensors hc_{attn,ffn}_{fn,base,scale} [24, 4D], [24], [3]."""

    def __init__(self, config: dict, index: int) -> None:
        super().__init__()
        self.fn = nn.Parameter(torch.randn(24, M * config["hidden_size"]) * 0.02)
        base = torch.zeros(24)
        base[:M], base[M:2 * M] = -1.5, -0.5
        base[index % M] += 2.0  # sites start out reading and writing different streams
        base[M + index % M] += 1.5
        base[2 * M:] = 3.0 * torch.eye(M).flatten()
        self.base = nn.Parameter(base)
        self.scale = nn.Parameter(torch.full((3,), 0.1))
        self.eps, self.norm_eps, self.iterations = config["hc_eps"], config["rms_norm_eps"], config["hc_sinkhorn_iters"]

    def read(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The collapsed input x [B, T, D], and post [B, T, 4], C [B, T, 4, 4] for write."""
        z = read_coefficients(h, self.fn, self.norm_eps)
        pre = torch.sigmoid(z[..., :M] * self.scale[0] + self.base[:M]) + self.eps
        post = 2 * torch.sigmoid(z[..., M:2 * M] * self.scale[1] + self.base[M:2 * M])
        c = sinkhorn.normalise((z[..., 2 * M:] * self.scale[2] + self.base[2 * M:]).unflatten(-1, (M, M)), self.iterations, self.eps)
        return (pre.unsqueeze(-1) * h.float()).sum(-2).to(h.dtype), post, c

    def write(self, y: Tensor, h: Tensor, post: Tensor, c: Tensor) -> Tensor:
        return (post.unsqueeze(-1) * y.float().unsqueeze(-2) + c.transpose(-1, -2) @ h.float()).to(h.dtype)


class Head(nn.Module):
    """The collapse before the final norm; official tensors hc_head_{fn,base,scale} [4, 4D], [4], [1]."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.fn = nn.Parameter(torch.randn(M, M * config["hidden_size"]) * 0.02)
        self.base = nn.Parameter(torch.zeros(M))
        self.scale = nn.Parameter(torch.full((1,), 0.1))
        self.eps, self.norm_eps = config["hc_eps"], config["rms_norm_eps"]

    def forward(self, h: Tensor) -> Tensor:
        pre = torch.sigmoid(read_coefficients(h, self.fn, self.norm_eps) * self.scale + self.base) + self.eps
        return (pre.unsqueeze(-1) * h.float()).sum(-2).to(h.dtype)
