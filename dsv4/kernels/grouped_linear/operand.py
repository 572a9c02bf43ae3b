"""The weight of `wo_a`: G block-diagonal projections stored as one [G*r, K] matrix, rows g*r .. (g+1)*r for group g."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dsv4.errors import KernelError
from dsv4.kernels.linear.launch import Launcher
from dsv4.kernels.linear.operand import Dense, dense
from dsv4.kernels.linear.tiled import Tiled, tiled_groups
from dsv4.quant.activations import Act, Treatment
from dsv4.quant.weights import Weight


@dataclass(frozen=True)
class GroupedOperand:
    """`groups` is what the CPU multiplies with, [G, r, K] joined; on a GPU `tiled` holds a matrix [r, K] per group."""

    weight: Weight | None
    nbytes: int
    treatment: Treatment
    joined: Dense | None
    tiled: tuple[Tiled, ...] = ()
    launcher: Launcher | None = field(default=None, repr=False, compare=False)

    @property
    def groups(self) -> Dense:
        """What a twin multiplies with: values [G, r, K], alpha [G, r] or None."""
        if self.joined is not None:
            return self.joined
        values = torch.stack([part.values() for part in self.tiled])
        return Dense(values, torch.full(values.shape[:-1], self.tiled[0].alpha, device=values.device))


def grouped_operand(weight: Weight, groups: int, *, act: Act) -> GroupedOperand:
    """Split `weight` [G*r, K] by groups. Only W4A4 quantises the input: DeepSeek's code feeds it plain BF16.

    A weight on a GPU is repacked, and the operand keeps nothing of the form it came in.
    """
    rows = weight.shape[-2]
    if rows % groups:
        raise KernelError(f"grouped_linear: {rows} rows of wo_a do not split into o_groups = {groups}")
    how: Treatment = "nvfp4" if act == "nvfp4" and weight.format in ("nvfp4", "mxfp4") else "none"
    if weight.device.type == "cuda":
        packed = tuple(tiled_groups(weight, groups))
        return GroupedOperand(None, weight.nbytes, how, None, packed, Launcher(packed))
    whole = dense(weight)
    alpha = None if whole.alpha is None else whole.alpha.unflatten(0, (groups, -1))
    split = Dense(whole.values.unflatten(0, (groups, -1)), alpha)
    return GroupedOperand(weight, weight.nbytes, how, split)
