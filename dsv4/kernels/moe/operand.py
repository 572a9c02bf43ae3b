"""Stacked expert weights: gate and up joined, down, and how their inputs are treated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.linear.operand import Dense, dense
from dsv4.kernels.moe.tiled import TiledExperts, tiled_experts
from dsv4.quant.activations import Act, Treatment, treatment
from dsv4.quant.weights import Weight


@dataclass(frozen=True)
class ExpertsOperand:
    """w1 (gate) and w3 (up) [E, F, D] as one `w13` [E, 2F, D], w2 as `down` [E, D, F]: dense on a CPU, tiled on a GPU,
    where nothing is kept of the weights as stored; `nbytes` is what those take. `arrivals` [2] i32, zero between
    launches, is where the blocks of one meet. The E experts are the layer's from number `first` on.
    """

    stored: tuple[Weight, Weight, Weight] | None
    in_treatment: Treatment
    mid_treatment: Treatment
    w13: Dense | TiledExperts
    down: Dense | TiledExperts
    nbytes: int
    arrivals: Tensor | None = None
    first: int = 0

    @property
    def held(self) -> range:
        """The numbers of the experts."""
        stacked = self.down.tiles if isinstance(self.down, TiledExperts) else self.down.values
        return range(self.first, self.first + len(stacked))

    @property
    def w1(self) -> Weight:
        return self._stored(0)

    @property
    def w2(self) -> Weight:
        return self._stored(1)

    @property
    def w3(self) -> Weight:
        return self._stored(2)

    def _stored(self, index: int) -> Weight:
        if self.stored is None:
            raise KernelError("experts on a GPU are held in tiles only; their stored form was not kept")
        return self.stored[index]


def experts_operand(w1: Weight, w2: Weight, w3: Weight, *, act: Act, first: int = 0) -> ExpertsOperand:
    """Join the projections of E experts, the first of which has number `first`. On a GPU they are repacked: NVFP4, and
    MXFP4 where the cast is exact.
    """
    treatments = treatment(w1.format, act), treatment(w2.format, act)
    nbytes = w1.nbytes + w2.nbytes + w3.nbytes
    if w1.device.type == "cuda":
        w13, down, arrivals = tiled_experts(w1=w1, w3=w3), tiled_experts(w2=w2), arrivals_on(w1.device)
        return ExpertsOperand(None, *treatments, w13, down, nbytes, arrivals, first)
    return ExpertsOperand((w1, w2, w3), *treatments, dense(w1, w3), dense(w2), nbytes, first=first)


def arrivals_on(device: torch.device) -> Tensor:
    return torch.zeros(2, dtype=torch.int32, device=device)
