"""Manifold-constrained hyper-connections: M residual streams around every sublayer.

A sublayer's way is enter, sublayer, leave; between two sublayers, leaving and entering are one op, a seam.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.kernels.mhc_head.mhc_head import mhc_head
from dsv4.kernels.mhc_last.mhc_last import mhc_last
from dsv4.kernels.mhc_post.mhc_post import mhc_post
from dsv4.kernels.mhc_pre.mhc_pre import mhc_pre
from dsv4.kernels.mhc_seam.mhc_seam import mhc_seam
from dsv4.kernels.mhc_seam.peers import ROWS, Peers, inbox_words
from dsv4.kernels.rms_norm.rms_norm import rms_norm
from dsv4.layers.peers import peers_among
from dsv4.layers.scope import Scope
from dsv4.layers.step import Given
from dsv4.parallel.mesh import Mesh


class Streams(NamedTuple):
    """The residual streams inside a site, between entering and leaving. There is no other residual path.

    Of many rows on several ranks, each rank has the streams of its part of the rows, and x of all: what a seam does to
    a row needs no other row.
    """

    h: Tensor  # [T, M, D] as the site before left them
    x: Tensor  # [T, D] collapsed and normed: the sublayer's input
    post: Tensor  # [T, M] f32: how its output goes back
    comb: Tensor  # [T, M, M] f32: how the streams mix meanwhile

    def leave(self, y: Tensor, tp: Mesh | None) -> Tensor:
        """The sublayer's output y [T, D] -> the streams [T, M, D] after its site. With `tp`, y f32 is a rank's part."""
        if tp is None:
            return mhc_post(y, self.h, self.post, self.comb)
        return whole(mhc_post(self.added(y, tp), self.h, self.post, self.comb), len(y), tp)

    def added(self, y: Tensor, tp: Mesh) -> Tensor:
        """The ranks' parts y [T, D] f32 of an output -> the rows of their sum that belong to `h`, in its dtype."""
        add = tp.all_reduce if len(self.h) == len(y) else tp.add_rows
        return add(y, self.h.dtype)


class Site:
    """One sublayer's connection to the streams: `hc_attn_*` and `attn_norm`, or `hc_ffn_*` and `ffn_norm`."""

    def __init__(self, scope: Scope, name: str, config: ModelConfig, tp: Mesh | None):
        self.tp, self.peers = tp, None if tp is None else peers_of(tp)
        self.fn, self.base, scale = (scope.f32(f"hc_{name}_{part}") for part in ("fn", "base", "scale"))
        streams = config.hc_mult
        rows = torch.tensor([streams, streams, streams**2], device=scale.device)
        self.scale = scale.repeat_interleave(rows)  # one factor per row of fn: pre, post, comb
        self.norm = scope.f32(f"{name}_norm.weight")
        self.iters, self.hc_eps, self.eps = config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps

    def enter(self, h: Tensor, out: Streams | None = None) -> Streams:
        """h [T, M, D] -> inside this site. With `out`, h is out.h."""
        rows = len(h)
        if self.tp is not None and out is None:
            h = h[self.tp.own_rows(rows, h.shape[-1])]
        pre = None if out is None else (torch.empty_like(out.x), out.post, out.comb)
        x, post, comb = mhc_pre(
            h, self.fn, self.base, self.scale, sinkhorn_iters=self.iters, hc_eps=self.hc_eps, norm_eps=self.eps, out=pre
        )
        x = rms_norm(x, self.norm, self.eps, out=None if out is None else out.x)
        return Streams(h, whole(x, rows, self.tp), post, comb)

    def seam(self, y: Tensor, before: Streams) -> Streams:
        """Leave the site before, with its sublayer's output y [T, D], and enter this one; `.h` lie between. With `tp`,
        y f32 is a rank's part.
        """
        if self.tp is None or (self.peers is not None and len(y) <= ROWS):
            given, named = self.seam_of(y, before)
            return Streams(*mhc_seam(*given, **named))
        given, named = self.seam_of(before.added(y, self.tp), before)
        h, x, post, comb = mhc_seam(*given, **(named | {"peers": None}))
        return Streams(h, whole(x, len(y), self.tp), post, comb)

    def seam_of(self, y: Tensor, before: Streams) -> Given:
        """What mhc_seam takes."""
        norms = {"sinkhorn_iters": self.iters, "hc_eps": self.hc_eps, "norm_eps": self.eps}
        peers = self.peers if len(y) <= ROWS else None
        site = self.fn, self.base, self.scale, self.norm
        return (y, before.h, before.post, before.comb, *site), {**norms, "peers": peers}


def whole(x: Tensor, rows: int, tp: Mesh | None) -> Tensor:
    """x [T, ...] of all rows of the step, of which it may have this rank's part."""
    return x if tp is None or len(x) == rows else tp.every_row(x)


@cache
def peers_of(tp: Mesh) -> Peers | None:
    """With whom a seam adds up the rows of a decode step by itself, if it can."""
    return peers_among(tp, inbox_words(tp.size), tp.comm.add)


class StreamHead:
    """`hc_head_*` and `norm`: the streams become the lm head's input."""

    def __init__(self, scope: Scope, config: ModelConfig, tp: Mesh | None):
        self.tp, self.peers = tp, None if tp is None else peers_of(tp)
        self.fn, self.base, self.scale = (scope.f32(f"hc_head_{part}") for part in ("fn", "base", "scale"))
        self.norm = scope.f32("norm.weight")
        self.hc_eps, self.eps = config.hc_eps, config.rms_norm_eps

    def __call__(self, h: Tensor) -> Tensor:
        """h [T, M, D] -> [T, D], normed."""
        x = mhc_head(h, self.fn, self.base, self.scale, hc_eps=self.hc_eps, norm_eps=self.eps)
        return rms_norm(x, self.norm, self.eps)

    def leave(self, y: Tensor, last: Streams) -> tuple[Tensor, Tensor]:
        """The last sublayer's output y [T, D] -> the streams [T, M, D] after its site and, bit for bit, what becomes of
        them here [T, D]. Of several ranks, y f32 is a rank's part.
        """
        if self.tp is not None and (self.peers is None or len(y) > ROWS):
            h = last.leave(y, self.tp)
            return h, self(h)
        site = last.h, last.post, last.comb, self.fn, self.base, self.scale
        h, x = mhc_last(y, *site, hc_eps=self.hc_eps, norm_eps=self.eps, peers=self.peers)
        return h, rms_norm(x, self.norm, self.eps)
