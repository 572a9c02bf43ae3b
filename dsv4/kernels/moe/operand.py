"""Stacked expert weights: gate and up joined, down, and how their inputs are treated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.kernels.linear.operand import Act, Treatment, treatment
from dsv4.quant.weights import Weight


@dataclass(frozen=True)
class ExpertsOperand:
    """w1 (gate), w3 (up) [E, F, D] and w2 (down) [E, D, F]; `w13` [E, 2F, D] and `w2_dense` float32 for the CPU."""

    w1: Weight
    w2: Weight
    w3: Weight
    in_treatment: Treatment
    mid_treatment: Treatment
    w13: Tensor
    w2_dense: Tensor

    @property
    def nbytes(self) -> int:
        return self.w1.nbytes + self.w2.nbytes + self.w3.nbytes


def experts_operand(w1: Weight, w2: Weight, w3: Weight, *, act: Act) -> ExpertsOperand:
    """Join the projections of E experts."""
    w13 = torch.cat([w1.dequantize(torch.float32), w3.dequantize(torch.float32)], dim=-2)
    return ExpertsOperand(
        w1, w2, w3, treatment(w1.format, act), treatment(w2.format, act), w13, w2.dequantize(torch.float32).contiguous()
    )
