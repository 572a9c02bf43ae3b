"""nano for training: DeepSeek-V4 as SPEC section 2 has it, dense over [B, T] and differentiable, written apart from
the inference code.

`Nano(config)(ids)` gives logits [B, T, V] float32; parameter names are the checkpoint's (experts stacked, see
export.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from attention import Attention, IndexerLoss, Linear, RMSNorm, W
from fakequant import Quant
from fuse import fused
from mhc import Head, M, Site
from moe import MoE
from torch import Tensor, nn


class Extra(NamedTuple):
    """What a layer adds to the loss beside its output."""

    balance: Tensor
    indexer: IndexerLoss | None


class Layer(nn.Module):
    def __init__(self, config: dict, index: int, ratio: int, hashed: bool, kind: str) -> None:
        super().__init__()
        d, eps = config["hidden_size"], config["rms_norm_eps"]
        self.hc_attn, self.hc_ffn = Site(config, 2 * index), Site(config, 2 * index + 1)
        self.attn_norm, self.ffn_norm = RMSNorm(d, eps), RMSNorm(d, eps)
        self.attn = Attention(config, ratio)
        self.ffn = MoE(config, hashed, kind)

    def forward(self, h: Tensor, ids: Tensor, quant: Quant, select: bool) -> tuple[Tensor, Extra]:
        x, post, c = self.hc_attn.read(h)
        y, indexer = self.attn(self.attn_norm(x), quant, select)
        h = self.hc_attn.write(y, h, post, c)
        x, post, c = self.hc_ffn.read(h)
        y, balance = self.ffn(self.ffn_norm(x), ids, quant)
        return self.hc_ffn.write(y, h, post, c), Extra(balance, indexer)


class MTP(Layer):
    """The draft block (SPEC 2.11): position t sees the trunk's streams of t and the embedding of token t+1, predicts
    token t+2."""

    def __init__(self, config: dict, index: int) -> None:
        super().__init__(config, index, 0, False, "mxfp4")
        d, eps = config["hidden_size"], config["rms_norm_eps"]
        self.e_proj, self.h_proj = Linear(d, d), Linear(d, d)
        self.enorm, self.hnorm, self.norm = RMSNorm(d, eps), RMSNorm(d, eps), RMSNorm(d, eps)
        self.hc_head = Head(config)


class Nano(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        d, v, ratios, n = (
            config["hidden_size"],
            config["vocab_size"],
            config["compress_ratios"],
            config["num_hidden_layers"],
        )
        self.embed = nn.Embedding(v, d)
        nn.init.normal_(
            self.embed.weight, std=0.5
        )  # sublayers see it normalised; this sets how fast their outputs come to matter
        self.layers = nn.ModuleList(
            Layer(config, i, ratios[i], i < config["num_hash_layers"], "nvfp4") for i in range(n)
        )
        self.norm = RMSNorm(d, config["rms_norm_eps"])
        self.head = Linear(v, d, "large", gain=0.5)
        self.hc_head = Head(config)
        self.mtp = nn.ModuleList(MTP(config, n + i) for i in range(config["num_nextn_predict_layers"]))

    def streams(self, ids: Tensor, quant: Quant, select: bool, dtype: torch.dtype) -> tuple[Tensor, list[Extra]]:
        """The four streams before the head [B, T, 4, D]; T a multiple of 128."""
        h = self.embed(ids).to(dtype).unsqueeze(2).expand(-1, -1, M, -1)
        extras = []
        for layer in self.layers:
            h, extra = layer(h, ids, quant, select)
            extras.append(extra)
        return h, extras

    def logits(self, x: Tensor, quant: Quant) -> Tensor:
        """In x's dtype."""
        return self.head(x, quant)

    def forward(
        self, ids: Tensor, quant: Quant = Quant(), select: bool = True, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """ids [B, T], any T >= 1 -> logits [B, T, V] float32."""
        t = ids.shape[1]
        h, _ = self.streams(F.pad(ids, (0, -t % W)), quant, select, dtype)
        return self.logits(self.norm(self.hc_head(h)), quant)[:, :t].float()

    def draft(self, h: Tensor, ids: Tensor, quant: Quant, which: int = 0) -> tuple[Tensor, Extra]:
        """MTP logits [B, T, V] from the trunk's streams and ids [B, T+1]: row t predicts token t+2."""
        block = self.mtp[which]
        e = block.e_proj(block.enorm(self.embed(ids[:, 1:]).to(h.dtype)), quant)
        x = e.unsqueeze(2) + block.h_proj(block.hnorm(h), quant)
        x, extra = block(x, ids[:, 1:], quant, True)
        return self.logits(block.norm(block.hc_head(x)), quant), extra


class Losses(NamedTuple):
    lm: Tensor
    mtp: Tensor
    kl: Tensor
    captured: Tensor
    balance: Tensor


def losses(model: Nano, ids: Tensor, weight: Tensor, quant: Quant, select: bool, dtype: torch.dtype) -> Losses:
    """ids and weight [B, T+2]; weight of a token counts where it is the one predicted. All terms are means in nats."""
    t = ids.shape[1] - 2
    h, extras = model.streams(ids[:, :t], quant, select, dtype)
    lm = weighted_cross_entropy(model.logits(model.norm(model.hc_head(h)), quant), ids[:, 1:-1], weight[:, 1:-1])
    drafted, extra = model.draft(h, ids[:, :-1], quant)
    mtp = weighted_cross_entropy(drafted, ids[:, 2:], weight[:, 2:])
    indexers = [e.indexer for e in extras if e.indexer is not None]
    kl, captured = (torch.stack(list(v)).mean() for v in zip(*indexers, strict=True))
    return Losses(lm, mtp, kl, captured, torch.stack([e.balance for e in [*extras, extra]]).sum())


def weighted_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return cross_entropy_sum(logits.flatten(0, 1), target.flatten(), weight.flatten()) / weight.sum()


@fused
def cross_entropy_sum(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    logits = logits.float()
    picked = torch.gather(logits, 1, target[:, None]).squeeze(1)
    return ((torch.logsumexp(logits, -1) - picked) * weight).sum()
