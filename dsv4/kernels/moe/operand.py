"""Stacked expert weights: gate and up joined, down, and how their inputs are treated."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4.kernels.linear.operand import Dense, dense
from dsv4.quant.activations import Act, Treatment, treatment
from dsv4.quant.weights import Weight


@dataclass(frozen=True)
class ExpertsOperand:
    """w1 (gate), w3 (up) [E, F, D] and w2 (down) [E, D, F]; `w13` [E, 2F, D] and `down` are what the CPU multiplies
    with.
    """

    w1: Weight
    w2: Weight
    w3: Weight
    in_treatment: Treatment
    mid_treatment: Treatment
    w13: Dense
    down: Dense

    @property
    def nbytes(self) -> int:
        return self.w1.nbytes + self.w2.nbytes + self.w3.nbytes


def experts_operand(w1: Weight, w2: Weight, w3: Weight, *, act: Act) -> ExpertsOperand:
    """Join the projections of E experts."""
    treatments = treatment(w1.format, act), treatment(w2.format, act)
    return ExpertsOperand(w1, w2, w3, *treatments, dense(w1, w3), dense(w2))
