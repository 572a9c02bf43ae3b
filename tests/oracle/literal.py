"""DeepSeek's inference script as its operations, in plain torch float32: one call per step, its caches, its shapes.

The walk-through says what is right; this says in which order. Rounding decisions hang on last bits, so what the model
is compared with here is built the way the script builds it: one product per module, no projection joined or skipped,
prefill at position 0 and then one token at a time, keys as [window ring | compressed entries]. The script's kernels
are written out as the sums they define. Batch is 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .files import linear_weight, read_folder
from .formats import hadamard
from .shape import Layer, read_shape


def round_up_pow2(x: Tensor) -> Tensor:
    """2^ceil(log2(x)) from the exponent and mantissa."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).int())


def act_quant(x: Tensor, group: int) -> Tensor:
    """E4M3 per group, back to float32."""
    blocks = x.unflatten(-1, (-1, group))
    amax = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-4)
    scale = round_up_pow2(amax * (1 / 448))
    return ((blocks / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).flatten(-2)


def fp4_act_quant(x: Tensor, group: int) -> Tensor:
    """E2M1 per group, ties to the even code, back to float32."""
    blocks = x.unflatten(-1, (-1, group))
    amax = blocks.abs().amax(-1, keepdim=True).clamp(min=6 * 2.0**-126)
    scale = round_up_pow2(amax * (1 / 6))
    y = (blocks / scale).clamp(-6, 6)
    size = y.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (torch.round(y / step) * step * scale).flatten(-2)


def apply_rotary(x: Tensor, cis: Tensor, inverse: bool = False) -> None:
    """x [1, S, (H,) R] rotated in place by cis [S, R/2]."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    if inverse:
        cis = cis.conj()
    cis = cis.view(1, pairs.size(1), 1, pairs.size(-1)) if x.ndim == 4 else cis.view(1, pairs.size(1), pairs.size(-1))
    x.copy_(torch.view_as_real(pairs * cis).flatten(-2))


def sinkhorn(mixes: Tensor, scale: Tensor, base: Tensor, m: int, iters: int, eps: float) -> tuple[Tensor, ...]:
    """mixes [1, S, (2 + m) m] -> pre, post [1, S, m] and comb [1, S, m, m]."""
    pre = torch.sigmoid(mixes[..., :m] * scale[0] + base[:m]) + eps
    post = 2 * torch.sigmoid(mixes[..., m : 2 * m] * scale[1] + base[m : 2 * m])
    comb = (mixes[..., 2 * m :] * scale[2] + base[2 * m :]).unflatten(-1, (m, m))
    comb = torch.softmax(comb, dim=-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return pre, post, comb


def sparse_attn(q: Tensor, kv: Tensor, sink: Tensor, idxs: Tensor, scale: float) -> Tensor:
    """q [1, S, H, d], kv [1, N, d], idxs [1, S, n] (-1 = none) -> [1, S, H, d]."""
    valid = idxs >= 0
    keys = kv[0][idxs.clamp(min=0)]
    scores = torch.einsum("bshd,bsnd->bshn", q, keys) * scale
    scores = scores.masked_fill(~valid.unsqueeze(2), float("-inf"))
    top = scores.amax(-1, keepdim=True)
    p = torch.exp(scores - top)
    total = p.sum(-1, keepdim=True) + torch.exp(sink.view(1, 1, -1, 1) - top)
    return torch.einsum("bshn,bsnd->bshd", p, keys) / total


class Files:
    """The checkpoint as float32 torch tensors."""

    def __init__(self, folder: Path):
        self.stored = read_folder(folder)
        self.linears: dict[str, tuple[str, Tensor]] = {}

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.stored[name].floats().astype(np.float32))

    def weight(self, module: str) -> tuple[str, Tensor]:
        """(format, [N, K]) of a linear."""
        if module not in self.linears:
            form, values = linear_weight(self.stored, module)
            self.linears[module] = form, torch.from_numpy(values.astype(np.float32))
        return self.linears[module]

    def linear(self, x: Tensor, module: str) -> Tensor:
        """Quantised weights take quantised input."""
        form, weight = self.weight(module)
        return F.linear(x if form == "plain" else act_quant(x, 128), weight)

    def norm(self, x: Tensor, module: str, eps: float) -> Tensor:
        return self.tensor(f"{module}.weight") * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


class Compressor:
    """One compressor with its running state and, once `cache` is set, where its entries go."""

    def __init__(self, files: Files, shape: Any, layer: Layer, prefix: str, width: int, cis: Tensor, rotate: bool):
        self.files, self.eps, self.p = files, shape.rms_norm_eps, prefix
        self.ratio, self.overlap = layer.ratio, layer.overlap
        self.d, self.rd, self.rotate, self.cis = width, shape.rope_dim, rotate, cis
        both = 2 if self.overlap else 1
        self.kv_state = torch.zeros(1, both * self.ratio, both * width)
        self.score_state = torch.full_like(self.kv_state, float("-inf"))
        self.ape = files.tensor(f"{prefix}.ape")
        self.cache = torch.empty(0)

    def overlap_transform(self, x: Tensor, fill: float) -> Tensor:
        """[1, n, ratio, 2d] -> [1, n, 2 ratio, d]: first halves of the window before, second halves of this one."""
        out = x.new_full((1, x.size(1), 2 * self.ratio, self.d), fill)
        out[:, :, self.ratio :] = x[:, :, :, self.d :]
        out[:, 1:, : self.ratio] = x[:, :-1, :, : self.d]
        return out

    def __call__(self, x: Tensor, start: int) -> Tensor | None:
        r, length = self.ratio, x.size(1)
        kv, score = self.files.linear(x.float(), f"{self.p}.wkv"), self.files.linear(x.float(), f"{self.p}.wgate")
        if start == 0:
            rest = length % r
            cut, offset = length - rest, r if self.overlap else 0
            if self.overlap and cut >= r:
                last = slice(cut - r, cut)
                self.kv_state[:, :r], self.score_state[:, :r] = kv[:, last], score[:, last] + self.ape
            if rest:
                self.kv_state[:, offset : offset + rest] = kv[:, cut:]
                self.score_state[:, offset : offset + rest] = score[:, cut:] + self.ape[:rest]
            if length < r:
                return None
            kv, score = kv[:, :cut].unflatten(1, (-1, r)), score[:, :cut].unflatten(1, (-1, r)) + self.ape
            if self.overlap:
                kv, score = self.overlap_transform(kv, 0), self.overlap_transform(score, float("-inf"))
            kv = (kv * score.softmax(dim=2)).sum(dim=2)
            cis = self.cis[:cut:r]
        else:
            score = score + self.ape[start % r]
            slot = start % r + (r if self.overlap else 0)
            self.kv_state[:, slot], self.score_state[:, slot] = kv[:, 0], score[:, 0]
            if (start + 1) % r:
                return None
            kv, score = self.kv_state, self.score_state
            if self.overlap:
                kv = torch.cat([kv[:, :r, : self.d], kv[:, r:, self.d :]], dim=1)
                score = torch.cat([score[:, :r, : self.d], score[:, r:, self.d :]], dim=1)
            kv = (kv * score.softmax(dim=1)).sum(dim=1, keepdim=True)
            if self.overlap:
                self.kv_state[:, :r], self.score_state[:, :r] = self.kv_state[:, r:], self.score_state[:, r:]
            cis = self.cis[start + 1 - r].unsqueeze(0)
        kv = self.files.norm(kv, f"{self.p}.norm", self.eps)
        apply_rotary(kv[..., -self.rd :], cis)
        if self.rotate:
            kv = fp4_act_quant(rotate_activation(kv), 32)
        else:
            kv[..., : -self.rd] = act_quant(kv[..., : -self.rd], 64)
        first = start // r
        self.cache[:, first : first + kv.size(1)] = kv
        return kv


def rotate_activation(x: Tensor) -> Tensor:
    """The Hadamard transform as the product it is."""
    n = x.size(-1)
    return F.linear(x, torch.from_numpy((hadamard(n) * n**0.5).round()).float()) * n**-0.5


class Attention:
    def __init__(self, files: Files, shape: Any, layer: Layer, prefix: str, most: int):
        self.files, self.c, self.layer, self.p = files, shape, layer, prefix
        angles = torch.outer(torch.arange(most, dtype=torch.float32), torch.from_numpy(layer.frequencies))
        self.cis = torch.polar(torch.ones_like(angles), angles)
        self.entries = most // layer.ratio if layer.ratio else 0
        self.kv_cache = torch.zeros(1, shape.sliding_window + self.entries, shape.head_dim)
        if layer.ratio:
            self.compressor = Compressor(files, shape, layer, f"{prefix}.compressor", shape.head_dim, self.cis, False)
            self.compressor.cache = self.kv_cache[:, shape.sliding_window :]
        if layer.overlap:
            name, width = f"{prefix}.indexer.compressor", shape.index_head_dim
            self.index_compressor = Compressor(files, shape, layer, name, width, self.cis, True)
            self.index_compressor.cache = torch.zeros(1, self.entries, width)

    def window_idxs(self, length: int, start: int) -> Tensor:
        """[1, S, n]: oldest first, -1 at the end; places in this call's keys, or in the ring when decoding."""
        size = self.c.sliding_window
        if start == 0:
            at = torch.arange(length).unsqueeze(1)
            idxs = (at - size + 1).clamp(0) + torch.arange(min(length, size))
            return torch.where(idxs > at, -1, idxs).unsqueeze(0)
        if start >= size - 1:
            turn = start % size
            return torch.cat([torch.arange(turn + 1, size), torch.arange(turn + 1)]).view(1, 1, -1)
        return F.pad(torch.arange(start + 1), (0, size - start - 1), value=-1).view(1, 1, -1)

    def compress_idxs(self, length: int, start: int, offset: int) -> Tensor:
        """[1, S, n]: every visible entry."""
        if start:
            return (torch.arange((start + 1) // self.layer.ratio) + offset).view(1, 1, -1)
        idxs = torch.arange(length // self.layer.ratio).repeat(length, 1)
        hidden = idxs >= torch.arange(1, length + 1).unsqueeze(1) // self.layer.ratio
        return torch.where(hidden, -1, idxs + offset).unsqueeze(0)

    def index(self, x: Tensor, qr: Tensor, start: int, offset: int) -> Tensor:
        c, p, ratio, end = self.c, f"{self.p}.indexer", self.layer.ratio, start + x.size(1)
        q = self.files.linear(qr, f"{p}.wq_b").unflatten(-1, (c.index_n_heads, c.index_head_dim))
        apply_rotary(q[..., -c.rope_dim :], self.cis[start:end])
        q = fp4_act_quant(rotate_activation(q), 32)
        self.index_compressor(x, start)
        weights = self.files.linear(x, f"{p}.weights_proj") * (c.index_head_dim**-0.5 * c.index_n_heads**-0.5)
        score = torch.einsum("bshd,btd->bsht", q, self.index_compressor.cache[:, : end // ratio])
        score = (score.relu_() * weights.unsqueeze(-1)).sum(dim=2)
        limit = torch.arange(start + 1, end + 1).unsqueeze(1) // ratio
        if start == 0:
            hidden = torch.arange(end // ratio).repeat(end, 1) >= limit
            score = score + torch.where(hidden, float("-inf"), 0)
        idxs = score.topk(min(c.index_topk, end // ratio), dim=-1)[1]
        return torch.where(idxs >= limit, -1, idxs + offset) if start == 0 else idxs + offset

    def __call__(self, x: Tensor, start: int) -> Tensor:
        c, files, p, length = self.c, self.files, self.p, x.size(1)
        cis, size, rd = self.cis[start : start + length], c.sliding_window, c.rope_dim
        qr = files.norm(files.linear(x, f"{p}.wq_a"), f"{p}.q_norm", c.rms_norm_eps)
        q = files.linear(qr, f"{p}.wq_b").unflatten(-1, (c.num_attention_heads, c.head_dim))
        q *= torch.rsqrt(q.square().mean(-1, keepdim=True) + c.rms_norm_eps)
        apply_rotary(q[..., -rd:], cis)
        kv = files.norm(files.linear(x, f"{p}.wkv"), f"{p}.kv_norm", c.rms_norm_eps)
        apply_rotary(kv[..., -rd:], cis)
        kv[..., :-rd] = act_quant(kv[..., :-rd], 64)
        idxs = self.window_idxs(length, start)
        if self.layer.ratio:
            offset = length if start == 0 else size
            more = self.index(x, qr, start, offset) if self.layer.overlap else self.compress_idxs(length, start, offset)
            idxs = torch.cat([idxs, more], dim=-1)
        if start == 0:
            kept = torch.arange(max(0, length - size), length)
            self.kv_cache[:, kept % size] = kv[:, kept]
            if self.layer.ratio and (entries := self.compressor(x, start)) is not None:
                kv = torch.cat([kv, entries], dim=1)
        else:
            self.kv_cache[:, start % size] = kv[:, 0]
            if self.layer.ratio:
                self.compressor(x, start)
            kv = self.kv_cache
        o = sparse_attn(q, kv, files.tensor(f"{p}.attn_sink"), idxs, c.head_dim**-0.5)
        apply_rotary(o[..., -rd:], cis, inverse=True)
        o = o.reshape(1, length, c.o_groups, -1)
        wo_a = files.weight(f"{p}.wo_a")[1].view(c.o_groups, c.o_lora_rank, -1)
        return files.linear(torch.einsum("bsgd,grd->bsgr", o, wo_a).flatten(2), f"{p}.wo_b")


class Literal:
    """One checkpoint folder and one sequence of at most `most` tokens."""

    def __init__(self, folder: Path, most: int):
        self.files, self.c = Files(Path(folder)), read_shape(Path(folder))
        self.attention = [
            Attention(self.files, self.c, layer, f"layers.{n}.attn", most) for n, layer in enumerate(self.c.layers)
        ]
        self.streams: dict[str, Tensor] = {}  # of the last call, as Model.forward(observe=...) names them

    @torch.inference_mode()
    def logits(self, ids: np.ndarray, prefill: int | None = None) -> Tensor:
        """Token ids [T] -> [T, V]: `prefill` of them (default all) at once, the rest one by one."""
        tokens, prefill = torch.from_numpy(ids), len(ids) if prefill is None else prefill
        parts = [(0, prefill), *((t, t + 1) for t in range(prefill, len(ids)))]
        return torch.cat([self.forward(tokens[first:last].unsqueeze(0), first)[0] for first, last in parts])

    def forward(self, ids: Tensor, start: int) -> Tensor:
        c, files = self.c, self.files
        h = F.embedding(ids, files.tensor("embed.weight")).unsqueeze(2).repeat(1, 1, c.hc_mult, 1)
        for n, layer in enumerate(c.layers):
            p = f"layers.{n}"
            h = self.streams[f"{p}.attn"] = self.site(h, p, "attn", lambda x, n=n: self.attention[n](x, start))
            h = self.streams[f"{p}.ffn"] = self.site(
                h, p, "ffn", lambda x, p=p, y=layer: self.moe(x, f"{p}.ffn", y, ids)
            )
        scale, base = files.tensor("hc_head_scale"), files.tensor("hc_head_base")
        pre = torch.sigmoid(self.mixes(h, "hc_head_fn") * scale + base) + c.hc_eps
        y = torch.sum(pre.unsqueeze(-1) * h, dim=2)
        return F.linear(files.norm(y, "norm", c.rms_norm_eps), files.weight("head")[1])

    def mixes(self, h: Tensor, fn: str) -> Tensor:
        x = h.flatten(2).float()
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.c.rms_norm_eps)
        return F.linear(x, self.files.tensor(fn)) * scale

    def site(self, h: Tensor, p: str, kind: str, sublayer: Any) -> Tensor:
        c, files = self.c, self.files
        scale, base = (files.tensor(f"{p}.hc_{kind}_{part}") for part in ("scale", "base"))
        mixes = self.mixes(h, f"{p}.hc_{kind}_fn")
        pre, post, comb = sinkhorn(mixes, scale, base, c.hc_mult, c.hc_sinkhorn_iters, c.hc_eps)
        y = torch.sum(pre.unsqueeze(-1) * h, dim=2)
        y = sublayer(files.norm(y, f"{p}.{kind}_norm", c.rms_norm_eps))
        return post.unsqueeze(-1) * y.unsqueeze(-2) + torch.sum(comb.unsqueeze(-1) * h.unsqueeze(-2), dim=2)

    def moe(self, x: Tensor, p: str, layer: Layer, ids: Tensor) -> Tensor:
        c, shape = self.c, x.shape
        x = x.view(-1, shape[-1])
        scores = F.softplus(self.files.linear(x.float(), f"{p}.gate")).sqrt()
        if layer.hash:
            chosen = torch.tensor(self.files.stored[f"{p}.gate.tid2eid"].raw)[ids.flatten()]
        else:
            chosen = (scores + self.files.tensor(f"{p}.gate.bias")).topk(c.num_experts_per_tok, dim=-1)[1]
        weights = scores.gather(1, chosen)
        weights /= weights.sum(dim=-1, keepdim=True)
        weights *= c.routed_scaling_factor
        y = torch.zeros_like(x, dtype=torch.float32)
        for expert in range(c.n_routed_experts):
            rows, top = torch.where(chosen == expert)
            if len(rows):
                y[rows] += self.expert(x[rows], f"{p}.experts.{expert}", weights[rows, top, None])
        y += self.expert(x, f"{p}.shared_experts", None)
        return y.view(shape)

    def expert(self, x: Tensor, p: str, weights: Tensor | None) -> Tensor:
        limit = self.c.swiglu_limit
        gate = self.files.linear(x, f"{p}.w1").float().clamp(max=limit)
        up = self.files.linear(x, f"{p}.w3").float().clamp(-limit, limit)
        x = F.silu(gate) * up
        return self.files.linear(x if weights is None else weights * x, f"{p}.w2")
