"""The whole forward pass of SPEC section 2, spelled out in numpy: one definition after the other, nothing cached.

Every query recomputes what it sees from the definitions, so there is no state, no paging and no chunking to get wrong.
`dtype` is float64 (the truth) or float32 (the same text, to see how much of a difference is rounding).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .files import linear_weight, read_folder
from .formats import Array, hadamard
from .rounding import Rounder
from .shape import Layer, read_shape


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x)."""
    return 1 / (1 + np.exp(-x))


def softplus(x: Array) -> Array:
    """log(1 + e^x), linear above 20 (SPEC 2.10)."""
    return np.where(x > 20, x, np.log1p(np.exp(np.minimum(x, 20))))


def softmax(x: Array, axis: int) -> Array:
    """Softmax; -inf entries get weight 0."""
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def rms_norm(x: Array, weight: Array | float, eps: float) -> Array:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension."""
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def rope(x: Array, positions: np.ndarray, frequencies: np.ndarray, sign: int = 1) -> Array:
    """SPEC 2.1: rotate adjacent pairs of the LAST dims by position * f_i (the product in float32).

    x [T, ..., d]; positions [T]; frequencies [r/2] -> rotates x[..., d-r:]; sign -1 rotates back.
    """
    angle = (positions.astype(np.float32)[:, None] * frequencies).astype(x.dtype)
    angle = sign * angle.reshape(len(positions), *[1] * (x.ndim - 2), len(frequencies))
    cos, sin = np.cos(angle), np.sin(angle)
    start = x.shape[-1] - 2 * len(frequencies)
    a, b = x[..., start::2], x[..., start + 1 :: 2]
    out = x.copy()
    out[..., start::2], out[..., start + 1 :: 2] = a * cos - b * sin, a * sin + b * cos
    return out


def sinkhorn(logits: Array, iterations: int, eps: float) -> Array:
    """SPEC 2.3 step 4: [..., 4, 4] logits -> nearly doubly stochastic C, ending on a column normalisation."""
    c = softmax(logits, -1) + eps
    c = c / (c.sum(-2, keepdims=True) + eps)
    for _ in range(iterations - 1):
        c = c / (c.sum(-1, keepdims=True) + eps)
        c = c / (c.sum(-2, keepdims=True) + eps)
    return c


class Walkthrough:
    """One checkpoint folder, ready to give logits. act is `none` or `fp8`."""

    def __init__(
        self,
        folder: Path,
        *,
        act: str = "none",
        kv_quant: bool = False,
        index_quant: bool = False,
        dtype: Any = np.float64,
        rounder: Rounder | None = None,
    ) -> None:
        self.c = read_shape(Path(folder))
        self.act, self.kv_quant, self.index_quant, self.dtype = act, kv_quant, index_quant, dtype
        self.rounder = rounder or Rounder()
        self.stored = read_folder(Path(folder))
        self.weights: dict[str, tuple[str, Array]] = {}
        # "layers.L.attn", "layers.L.ffn": the streams [T, M, D] after that site; and "logits"
        self.streams: dict[str, Array] = {}

    # ---- reading -------------------------------------------------------------------------------------------------
    def tensor(self, name: str) -> Array:
        """A tensor that is not a quantised linear."""
        return self.stored[name].floats().astype(self.dtype)

    def linear(self, x: Array, module: str) -> Array:
        """x [T, K] times the transposed weight of `module`; in act=fp8 an FP8 or FP4 weight takes quantised input."""
        if module not in self.weights:
            form, values = linear_weight(self.stored, module)
            self.weights[module] = form, values.astype(self.dtype)
        form, weight = self.weights[module]
        if self.act == "fp8" and form in ("fp8", "fp4"):
            x = self.rounder.act(x, 128, module.rsplit(".", 1)[-1])
        return x @ weight.T

    # ---- the model -----------------------------------------------------------------------------------------------
    def logits(self, ids: np.ndarray) -> Array:
        """Token ids [T] -> logits [T, V]."""
        h = np.repeat(self.tensor("embed.weight")[ids][:, None, :], self.c.hc_mult, axis=1)  # SPEC 2.2
        for number, layer in enumerate(self.c.layers):
            h = self.site(h, f"layers.{number}.", "attn", lambda x, p, n=layer: self.attention(x, f"{p}attn.", n))
            h = self.site(h, f"layers.{number}.", "ffn", lambda x, p, n=layer: self.moe(x, f"{p}ffn.", n, ids))
        z = self.mix(h, "hc_head_fn")  # SPEC 2.3, head
        pre = sigmoid(z * self.tensor("hc_head_scale") + self.tensor("hc_head_base")) + self.c.hc_eps
        x = (pre[..., None] * h).sum(1)
        self.streams["logits"] = self.linear(self.norm(x, "norm"), "head")  # SPEC 2.12
        return self.streams["logits"]

    def norm(self, x: Array, module: str) -> Array:
        """RMSNorm with the weight of `module`."""
        return rms_norm(x, self.tensor(f"{module}.weight"), self.c.rms_norm_eps)

    def mix(self, h: Array, name: str) -> Array:
        """SPEC 2.3 steps 1 and 2: h [T, M, D] -> z [T, rows of fn]."""
        v = h.reshape(len(h), -1)
        r = 1 / np.sqrt((v * v).mean(-1, keepdims=True) + self.c.rms_norm_eps)
        return (v @ self.tensor(name).T) * r

    def site(self, h: Array, prefix: str, kind: str, sublayer: Any) -> Array:
        """SPEC 2.3: collapse the streams, run one sublayer, mix its output back in."""
        m = self.c.hc_mult
        z = self.mix(h, f"{prefix}hc_{kind}_fn")
        scale, base = self.tensor(f"{prefix}hc_{kind}_scale"), self.tensor(f"{prefix}hc_{kind}_base")
        pre = sigmoid(z[:, :m] * scale[0] + base[:m]) + self.c.hc_eps
        post = 2 * sigmoid(z[:, m : 2 * m] * scale[1] + base[m : 2 * m])
        comb = (z[:, 2 * m :] * scale[2] + base[2 * m :]).reshape(-1, m, m)
        comb = sinkhorn(comb, self.c.hc_sinkhorn_iters, self.c.hc_eps)
        x = (pre[..., None] * h).sum(1)
        y = sublayer(self.norm(x, f"{prefix}{kind}_norm"), prefix)
        self.streams[prefix + kind] = post[..., None] * y[:, None, :] + np.einsum("tjk,tjd->tkd", comb, h)
        return self.streams[prefix + kind]

    # ---- attention -----------------------------------------------------------------------------------------------
    def attention(self, x: Array, p: str, layer: Layer) -> Array:
        """SPEC 2.4, 2.5, 2.7, 2.9: x [T, D] -> [T, D]."""
        c, tokens = self.c, len(x)
        positions = np.arange(tokens)
        qr = self.norm(self.linear(x, f"{p}wq_a"), f"{p}q_norm")
        q = self.linear(qr, f"{p}wq_b").reshape(tokens, c.num_attention_heads, c.head_dim)
        q = rope(rms_norm(q, 1.0, c.rms_norm_eps), positions, layer.frequencies)
        kv = rope(self.norm(self.linear(x, f"{p}wkv"), f"{p}kv_norm"), positions, layer.frequencies)
        kv = self.quantise_kv(kv, "kv")
        if layer.ratio:
            entries = self.quantise_kv(self.compress(x, f"{p}compressor.", layer, c.head_dim), "entry")
        if layer.overlap:
            chosen = self.index(x, qr, f"{p}indexer.", layer)
        sink = self.tensor(f"{p}attn_sink")[:, None]
        out = np.empty_like(q)
        for t in range(tokens):
            seen = kv[max(0, t - c.sliding_window + 1) : t + 1]
            if layer.ratio:
                visible = chosen[t] if layer.overlap else np.arange((t + 1) // layer.ratio)
                seen = np.concatenate([seen, entries[visible]])
            s = (q[t] @ seen.T) * c.head_dim**-0.5
            top = np.maximum(s.max(-1, keepdims=True), sink)
            e = np.exp(s - top)
            out[t] = (e @ seen) / (e.sum(-1, keepdims=True) + np.exp(sink - top))
        out = rope(out, positions, layer.frequencies, sign=-1)
        groups = out.reshape(tokens, c.o_groups, -1)
        wo_a = linear_weight(self.stored, f"{p}wo_a")[1].astype(self.dtype)  # its input is never quantised
        low = np.einsum("tgd,grd->tgr", groups, wo_a.reshape(c.o_groups, c.o_lora_rank, -1))
        return self.linear(low.reshape(tokens, -1), f"{p}wo_b")

    def quantise_kv(self, kv: Array, kind: str) -> Array:
        """SPEC 2.4: FP8 in groups of 64 on the dims before the rope dims."""
        if not self.kv_quant:
            return kv
        nope = self.c.head_dim - self.c.rope_dim
        return np.concatenate([self.rounder.act(kv[..., :nope], 64, kind), kv[..., nope:]], -1)

    def compress(self, x: Array, p: str, layer: Layer, width: int) -> Array:
        """SPEC 2.6: x [T, D] -> entries [T // ratio, width], normed and rotated, not yet quantised."""
        m, count = layer.ratio, len(x) // layer.ratio
        u = self.linear(x, f"{p}wkv")
        g = self.linear(x, f"{p}wgate") + np.tile(self.tensor(f"{p}ape"), (count + 1, 1))[: len(x)]
        out = np.empty((count, width), self.dtype)
        for i in range(count):
            now, before = slice(m * i, m * i + m), slice(m * i - m, m * i)
            if not layer.overlap:
                values, gates = u[now], g[now]
            elif i == 0:
                values, gates = u[now, width:], g[now, width:]
            else:  # the first half of the window before, the second half of this one
                values = np.concatenate([u[before, :width], u[now, width:]])
                gates = np.concatenate([g[before, :width], g[now, width:]])
            out[i] = (softmax(gates, 0) * values).sum(0)
        return rope(self.norm(out, f"{p}norm"), np.arange(count) * m, layer.frequencies)

    def index(self, x: Array, qr: Array, p: str, layer: Layer) -> list[np.ndarray]:
        """SPEC 2.8: for every query the entries it attends to."""
        c, tokens = self.c, len(x)
        heads, width = c.index_n_heads, c.index_head_dim
        q = rope(self.linear(qr, f"{p}wq_b").reshape(tokens, heads, width), np.arange(tokens), layer.frequencies)
        k = self.compress(x, f"{p}compressor.", layer, width)
        w = self.linear(x, f"{p}weights_proj") * (width**-0.5 * heads**-0.5)
        choosy = (c.index_topk + 1) * layer.ratio - 1  # the first query that sees more than it may take
        q = q[choosy:]
        if self.index_quant:
            turn = hadamard(width).astype(self.dtype)
            q, k = self.rounder.fp4(q @ turn, "index_q"), self.rounder.fp4(k @ turn, "index_k")
        chosen = [np.arange((t + 1) // layer.ratio) for t in range(min(choosy, tokens))]
        for t in range(choosy, tokens):
            scores = w[t] @ np.maximum(q[t - choosy] @ k[: (t + 1) // layer.ratio].T, 0)
            chosen.append(self.rounder.top(scores, c.index_topk, "topk"))
        return chosen

    # ---- experts -------------------------------------------------------------------------------------------------
    def moe(self, x: Array, p: str, layer: Layer, ids: np.ndarray) -> Array:
        """SPEC 2.10: routed experts and the shared one."""
        c = self.c
        s = np.sqrt(softplus(self.linear(x, f"{p}gate")))
        if layer.hash:
            chosen = self.stored[f"{p}gate.tid2eid"].raw[ids]
        else:
            biased = s + self.tensor(f"{p}gate.bias")
            chosen = np.stack([self.rounder.top(row, c.num_experts_per_tok, "route") for row in biased])
        weights = np.take_along_axis(s, chosen, axis=1)
        weights = weights / weights.sum(-1, keepdims=True) * c.routed_scaling_factor
        y = self.expert(x, f"{p}shared_experts.", 1.0)
        for expert in range(c.n_routed_experts):
            rows, places = np.nonzero(chosen == expert)
            if len(rows):
                y[rows] += self.expert(x[rows], f"{p}experts.{expert}.", weights[rows, places][:, None])
        return y

    def expert(self, x: Array, p: str, weight: Array | float) -> Array:
        """w2(weight * silu(min(w1 x, limit)) * clamp(w3 x, +-limit))."""
        limit = self.c.swiglu_limit
        g = np.minimum(self.linear(x, f"{p}w1"), limit)
        u = np.clip(self.linear(x, f"{p}w3"), -limit, limit)
        return self.linear(weight * (g * sigmoid(g)) * u, f"{p}w2")
