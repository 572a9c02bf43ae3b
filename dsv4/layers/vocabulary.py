"""The lm head: from the last activations to logits."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from dsv4.kernels.gather_columns.gather_columns import ROWS, TURNS, gather_columns, gather_words
from dsv4.kernels.linear.linear import linear
from dsv4.kernels.linear.operand import Projection, linear_operand
from dsv4.kernels.mhc_seam.peers import Peers
from dsv4.layers.peers import peers_among
from dsv4.layers.settings import Settings
from dsv4.parallel.mesh import Mesh
from dsv4.quant.weights import Weight


class Vocabulary:
    """`head`: of several ranks each has a part of the vocabulary, and all get all logits."""

    def __init__(self, weight: Weight, settings: Settings):
        self.operand = linear_operand(Projection(weight, plain=True, f32=True), act=settings.act)
        self.tp = settings.tp
        self.peers = None if self.tp is None else shares_of(self.tp, weight.shape[0])

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [T, D] -> logits [T, V] f32, in `out` if it is given."""
        if self.tp is None:
            (logits,) = linear(x, self.operand, out=None if out is None else (out,))
            return logits
        (part,) = linear(x, self.operand)
        if self.peers is not None and len(x) <= ROWS:
            return gather_columns(part, self.peers, out=out)
        return self.tp.all_gather(part, out)


@cache
def shares_of(tp: Mesh, columns: int) -> Peers | None:
    """With whom the logits of a decode step are exchanged, if they can be."""
    return peers_among(tp, gather_words(tp.size, columns), tp.all_gather, turns=TURNS)
