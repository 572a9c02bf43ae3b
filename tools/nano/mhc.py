"""Manifold-constrained hyper-connections (SPEC 2.3) over four residual streams h [B, T, 4, D]."""

from __future__ import annotations

import sinkhorn
import torch
import torch.nn.functional as F
from fuse import fused
from torch import Tensor, nn

M = 4


def products(h: Tensor, fn: Tensor) -> Tensor:
    """fn times the flattened streams, before the RMS scale; rows padded to a multiple of 8, which the matrix units
    want."""
    return F.linear(h.flatten(-2).float(), F.pad(fn, (0, 0, 0, -fn.shape[0] % 32)))[..., : fn.shape[0]]


def inverse_rms(h: Tensor, eps: float) -> Tensor:
    """Unweighted, over all 4D."""
    return torch.rsqrt(h.float().square().mean((-1, -2), keepdim=True) + eps).squeeze(-1)


@fused
def read(
    h: Tensor, z: Tensor, scale: Tensor, base: Tensor, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """h [n, 4, D], z [n, 24] -> the collapsed input [n, D], post [n, 4], the logits of C [n, 4, 4]."""
    z = z * inverse_rms(h, norm_eps)
    pre = torch.sigmoid(z[:, :M] * scale[0] + base[:M]) + eps
    post = 2 * torch.sigmoid(z[:, M : 2 * M] * scale[1] + base[M : 2 * M])
    logits = (z[:, 2 * M :] * scale[2] + base[2 * M :]).view(-1, M, M)
    return collapse(h, pre), post, logits


def collapse(h: Tensor, pre: Tensor) -> Tensor:
    return sum(pre[:, j : j + 1] * h[:, j].float() for j in range(M)).to(h.dtype)


@fused
def write(y: Tensor, h: Tensor, post: Tensor, c: Tensor) -> Tensor:
    """h'_k = post_k y + sum_j C[j, k] h_j."""
    streams = [h[:, j].float() for j in range(M)]
    out = [post[:, k : k + 1] * y.float() + sum(c[:, j, k, None] * streams[j] for j in range(M)) for k in range(M)]
    return torch.stack(out, 1).to(h.dtype)


@fused
def read_head(h: Tensor, z: Tensor, scale: Tensor, base: Tensor, eps: float, norm_eps: float) -> Tensor:
    return collapse(h, torch.sigmoid(z * inverse_rms(h, norm_eps) * scale + base) + eps)


class Site(nn.Module):
    """One attention or FFN site; official tensors hc_{attn,ffn}_{fn,base,scale} [24, 4D], [24], [3]."""

    def __init__(self, config: dict, index: int) -> None:
        super().__init__()
        self.fn = nn.Parameter(torch.randn(24, M * config["hidden_size"]) * 0.02)
        base = torch.zeros(24)
        base[:M], base[M : 2 * M] = -1.5, -0.5
        base[index % M] += 2.0  # sites start out reading and writing different streams
        base[M + index % M] += 1.5
        base[2 * M :] = 3.0 * torch.eye(M).flatten()
        self.base = nn.Parameter(base)
        self.scale = nn.Parameter(torch.full((3,), 0.1))
        self.eps, self.norm_eps, self.iterations = config["hc_eps"], config["rms_norm_eps"], config["hc_sinkhorn_iters"]

    def read(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The collapsed input x [B, T, D], and post [B*T, 4], C [B*T, 4, 4] for write."""
        flat = h.flatten(0, 1)
        x, post, logits = read(flat, products(flat, self.fn), self.scale, self.base, self.eps, self.norm_eps)
        return x.view(*h.shape[:2], -1), post, sinkhorn.normalise(logits, self.iterations, self.eps)

    def write(self, y: Tensor, h: Tensor, post: Tensor, c: Tensor) -> Tensor:
        return write(y.flatten(0, 1), h.flatten(0, 1), post, c).view_as(h)


class Head(nn.Module):
    """The collapse before the final norm; official tensors hc_head_{fn,base,scale} [4, 4D], [4], [1]."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.fn = nn.Parameter(torch.randn(M, M * config["hidden_size"]) * 0.02)
        self.base = nn.Parameter(torch.zeros(M))
        self.scale = nn.Parameter(torch.full((1,), 0.1))
        self.eps, self.norm_eps = config["hc_eps"], config["rms_norm_eps"]

    def forward(self, h: Tensor) -> Tensor:
        flat = h.flatten(0, 1)
        return read_head(flat, products(flat, self.fn), self.scale, self.base, self.eps, self.norm_eps).view(
            *h.shape[:2], -1
        )
