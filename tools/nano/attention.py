"""Attention of SPEC 2.4 to 2.9, dense over [B, T]: window in chunks of 128, compressed entries all at once under a
mask.

Shapes: x [B, T, D]; q [B, T, H, 512]; kv [B, T, 512]; entries [B, N, 512] with N = T / m. T is a multiple of 128.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import fakequant as fq
import torch
import torch.nn.functional as F
from fakequant import Quant
from fuse import fused
from torch import Tensor, nn

W = 128


class Linear(nn.Module):
    """A weight [N, K] in float32 and the kind it is stored as (fakequant.weight)."""

    def __init__(self, n: int, k: int, kind: str = "fp8", gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, k) * (gain * k**-0.5))
        self.kind = kind

    def forward(self, x: Tensor, quant: Quant) -> Tensor:
        return F.linear(fq.activation(x, self.kind, quant), fq.weight(self.weight, self.kind, quant).to(x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x.reshape(-1, x.shape[-1]), self.weight, self.eps).view_as(x)


@fused
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def frequencies(config: dict, compressed: bool) -> Tensor:
    """[32] rotation frequencies in float64: plain 10000 for window layers, 160000 with YaRN where KV is compressed."""
    rd = config["qk_rope_head_dim"]
    i = torch.arange(rd // 2, dtype=torch.float64)
    if not compressed:
        return config["rope_theta"] ** (-2 * i / rd)
    base, yarn = config["compress_rope_theta"], config["rope_scaling"]

    def corr(r: float) -> float:
        return rd * math.log(yarn["original_max_position_embeddings"] / (2 * math.pi * r)) / (2 * math.log(base))

    low, high = max(math.floor(corr(yarn["beta_fast"])), 0), min(math.ceil(corr(yarn["beta_slow"])), rd - 1)
    ramp = ((i - low) / max(high - low, 1e-3)).clamp(0, 1)
    f = base ** (-2 * i / rd)
    return f * (1 - ramp) + f / yarn["factor"] * ramp


def rotate(x: Tensor, positions: Tensor, freqs: Tensor, inverse: bool = False) -> Tensor:
    """RoPE on adjacent pairs of the last 64 channels; x [B, T, ..., C], positions [T]."""
    angle = positions.float()[:, None] * freqs.float()
    angle = angle.view(angle.shape[0], *([1] * (x.dim() - 3)), angle.shape[1])
    cos, sin = torch.cos(angle), torch.sin(-angle if inverse else angle)
    shape = x.shape
    cos, sin = (v.expand(*shape[:-1], -1).reshape(-1, v.shape[-1]) for v in (cos, sin))
    return turn(x.reshape(-1, shape[-1]), cos, sin).view(shape)


@fused
def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [n, C], cos and sin [n, 32]."""
    n = 2 * cos.shape[-1]
    a, b = x[..., -n:].float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.cat([x[..., :-n], turned.to(x.dtype)], -1)


@fused
def head_norm(q: Tensor, eps: float) -> Tensor:
    """Each head over its own RMS, no weight; q [n, C]."""
    y = q.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(q.dtype)


@fused
def pool(u: Tensor, g: Tensor, ape: Tensor, first: Tensor | None) -> Tensor:
    """u, g [entries, m, width] -> [entries, C] float32. With overlap width is 2C: the first half of the entry before,
    the second of its own;
    `first` [entries] marks those without an entry before."""
    u, g = u.float(), g.float() + ape
    if first is not None:
        c = u.shape[-1] // 2
        before = torch.roll(g[..., :c], 1, 0).masked_fill(first[:, None, None], -torch.inf)
        g = torch.cat([before, g[..., c:]], 1)
        u = torch.cat([torch.roll(u[..., :c], 1, 0), u[..., c:]], 1)
    return (torch.softmax(g, 1) * u).sum(1)


@fused
def attend(
    near: Tensor, far: Tensor | None, near_mask: Tensor, shown: Tensor | None, sink: Tensor, scale: float
) -> Tensor:
    """One softmax over window, shown entries and sink; [B, T, H, 2W + N + 8] in near's dtype, the last 8 columns
    (sink, padding) unused."""
    parts = [near.float() * scale + near_mask]
    if far is not None:
        parts.append(torch.where(shown, far.float() * scale, -torch.inf))
    parts.append(F.pad(sink.view(1, 1, -1, 1), (0, 7), value=-torch.inf).expand(*near.shape[:3], -1))
    return torch.softmax(torch.cat(parts, -1), -1).to(near.dtype)


class Compressor(nn.Module):
    """Pools m tokens (CSA: of two overlapping windows) into one entry; projection and pooling in float32."""

    def __init__(self, config: dict, ratio: int, width: int) -> None:
        super().__init__()
        self.ratio, self.width, self.overlap = ratio, width, ratio == 4
        n = width * (1 + self.overlap)
        self.wkv = Linear(n, config["hidden_size"], "large")
        self.wgate = Linear(n, config["hidden_size"], "large", gain=0.1)
        self.ape = nn.Parameter(torch.zeros(ratio, n))
        self.norm = RMSNorm(width, config["rms_norm_eps"])

    def forward(self, x: Tensor, freqs: Tensor, quant: Quant) -> Tensor:
        b, n = x.shape[0], x.shape[1] // self.ratio
        u, g = (linear(x, quant).view(b * n, self.ratio, -1) for linear in (self.wkv, self.wgate))
        number = torch.arange(n, device=x.device)
        pooled = pool(u, g, self.ape, (number == 0).repeat(b) if self.overlap else None).to(x.dtype).view(b, n, -1)
        return rotate(self.norm(pooled), number * self.ratio, freqs)


class Indexer(nn.Module):
    """Scores the entries of a CSA layer for each query: [B, T, N] float32. Its inputs carry no gradient to the
    trunk."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.heads, self.dim = config["index_n_heads"], config["index_head_dim"]
        self.wq_b = Linear(self.heads * self.dim, config["q_lora_rank"])
        self.weights_proj = Linear(self.heads, config["hidden_size"], "plain")
        self.compressor = Compressor(config, 4, self.dim)

    def forward(self, x: Tensor, qr: Tensor, positions: Tensor, freqs: Tensor, quant: Quant) -> Tensor:
        x, qr = x.detach(), qr.detach()
        q = rotate(self.wq_b(qr, quant).unflatten(-1, (self.heads, self.dim)), positions, freqs)
        q = fq.index_vector(q, quant)
        k = fq.index_vector(self.compressor(x, freqs, quant), quant)
        w = self.weights_proj(x, quant).float() * (self.dim * self.heads) ** -0.5
        dots = F.relu(q.flatten(1, 2) @ k.transpose(1, 2)).unflatten(1, (-1, self.heads))  # [B, T, heads, N]
        return torch.matmul(w.unsqueeze(-2).to(dots.dtype), dots).squeeze(-2).float()


class IndexerLoss(NamedTuple):
    kl: Tensor  # mean over queries, nats
    captured: Tensor  # share of the attention mass on entries that the top-k keeps


class Attention(nn.Module):
    def __init__(self, config: dict, ratio: int) -> None:
        super().__init__()
        d, h, c, r = config["hidden_size"], config["num_attention_heads"], config["head_dim"], config["q_lora_rank"]
        self.h, self.c, self.ratio, self.groups = h, c, ratio, config["o_groups"]
        self.topk, self.eps = config["index_topk"], config["rms_norm_eps"]
        self.wq_a, self.wq_b = Linear(r, d), Linear(h * c, r)
        self.wkv = Linear(c, d)
        self.q_norm, self.kv_norm = RMSNorm(r, self.eps), RMSNorm(c, self.eps)
        self.wo_a = Linear(self.groups * config["o_lora_rank"], h // self.groups * c)
        self.wo_b = Linear(d, self.groups * config["o_lora_rank"], gain=0.4)
        self.attn_sink = nn.Parameter(torch.zeros(h))
        self.compressor = Compressor(config, ratio, c) if ratio else None
        self.indexer = Indexer(config) if ratio == 4 else None
        self.register_buffer("freqs", frequencies(config, ratio > 0), persistent=False)

    def forward(self, x: Tensor, quant: Quant, select: bool) -> tuple[Tensor, IndexerLoss | None]:
        b, t, _ = x.shape
        positions = torch.arange(t, device=x.device)
        qr = self.q_norm(self.wq_a(x, quant))
        q = head_norm(self.wq_b(qr, quant).view(-1, self.c), self.eps).view(b, t, self.h, self.c)
        q = rotate(q, positions, self.freqs)
        kv = fq.kv_cache(rotate(self.kv_norm(self.wkv(x, quant)), positions, self.freqs), quant)

        chunks = t // W
        near = kv.view(b, chunks, W, self.c)
        near = torch.cat([F.pad(near[:, :-1], (0, 0, 0, 0, 1, 0)), near], 2).flatten(0, 1)  # [B*chunks, 2W, C]
        rows = q.reshape(b * chunks, W * self.h, self.c)
        near_logits = (rows @ near.transpose(1, 2)).view(b, t, self.h, 2 * W)
        scores = entries = far = mask = None
        if self.compressor is not None:
            entries = fq.kv_cache(self.compressor(x, self.freqs, quant), quant)
            n = entries.shape[1]
            visible = torch.arange(n, device=x.device) < ((positions + 1) // self.ratio)[:, None]  # [T, N]
            shown = visible
            if self.indexer is not None:
                scores = self.indexer(x, qr, positions, self.freqs, quant).masked_fill(~visible, -torch.inf)
                if n > self.topk:
                    top = scores.detach().topk(self.topk, -1).indices
                    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, top, True) & visible
                    shown = kept if select else visible
            far = (q.flatten(1, 2) @ entries.transpose(1, 2)).view(b, t, self.h, n)
            mask = shown.view(-1, t, 1, n)
        p = attend(near_logits, far, window_mask(t, x.device), mask, self.attn_sink, self.c**-0.5)
        p_near = p[..., : 2 * W].reshape(b * chunks, W * self.h, 2 * W)
        out = (p_near @ near).view(b, t, self.h, self.c)
        loss = None
        if entries is not None:
            p_far = p[..., 2 * W : -8]
            out = out + (p_far.reshape(b, t * self.h, -1) @ entries).view_as(out)
            if scores is not None and self.training:
                kept = kept if n > self.topk else visible.expand_as(scores)
                loss = indexer_loss(scores, p_far.detach().float().sum(2), shown.expand_as(scores), kept)
        out = rotate(out, positions, self.freqs, inverse=True).reshape(b, t, self.groups, -1)
        wo_a = fq.weight(self.wo_a.weight, "fp8", quant).to(x.dtype).unflatten(0, (self.groups, -1))
        out = torch.einsum("btgd,grd->btgr", fq.activation(out, "grouped", quant), wo_a)
        return self.wo_b(out.flatten(2), quant), loss


def window_mask(t: int, device: torch.device) -> Tensor:
    """[T, 1, 2W] additive: a query of chunk c sees keys of chunks c-1 and c that are 0..127 tokens back."""
    q = torch.arange(t, device=device)[:, None]
    k = q // W * W - W + torch.arange(2 * W, device=device)
    ok = (k >= 0) & (k <= q) & (k > q - W)
    return torch.zeros(t, 1, 2 * W, device=device).masked_fill(~ok[:, None], -torch.inf)


def indexer_loss(scores: Tensor, mass: Tensor, shown: Tensor, kept: Tensor) -> IndexerLoss:
    """KL(attention over the shown entries || softmax of the scores over them), queries that see an entry only."""
    total = mass.sum(-1, keepdim=True)
    some = shown[..., 0:1] | shown.any(-1, keepdim=True)
    p = mass / total.clamp(min=1e-9)
    log_q = torch.log_softmax(scores.masked_fill(~shown, -1e9), -1)
    kl = torch.where(shown & (p > 0), p * (p.clamp(min=1e-9).log() - log_q), 0.0).sum(-1, keepdim=True)
    captured = (mass * kept).sum(-1, keepdim=True) / total.clamp(min=1e-9)
    count = some.sum().clamp(min=1)
    return IndexerLoss((kl * some).sum() / count, (captured * some).sum() / count)
