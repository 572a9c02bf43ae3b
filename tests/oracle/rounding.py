"""Rounding with its margins: every discontinuity of the walk-through passes through one object.

A quantiser and a top-k are steps: two right implementations whose inputs differ in the last bit may take different
sides. `Rounder` therefore measures, for all decisions that matter, how far the input was from the other side.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from . import formats
from .formats import Array


@dataclass
class Margin:
    """Closest call of one kind of decision, relative to the group's largest magnitude (or to the score's)."""

    smallest: float = np.inf
    decisions: int = 0
    within: dict[float, int] = field(default_factory=lambda: {1e-5: 0, 1e-6: 0, 1e-7: 0})

    def add(self, distances: Array) -> None:
        """Count a batch of distances to the nearest boundary."""
        if distances.size == 0:
            return
        self.smallest = min(self.smallest, float(distances.min()))
        self.decisions += distances.size
        for limit in self.within:
            self.within[limit] += int((distances < limit).sum())


class Rounder:
    """The definition's own decisions, and the margin of each kind.

    Kinds: the linear whose input is rounded (`wq_a`, `w2`, ...), `kv`, `entry` (compressed kv), `index_q`, `index_k`;
    `topk` and `route`; and `scale` for the power of two above a group's largest value.
    """

    def __init__(self, measure: bool = False) -> None:
        self.measure = measure
        self.margins: dict[str, Margin] = {}

    def act(self, x: Array, group: int, kind: str) -> Array:
        """E4M3 fake quantisation in groups (SPEC 2.0)."""
        if self.measure:
            self._note(x, formats.act_scale(x, group), group, formats.E4M3_MAGNITUDES, kind, 448)
        return formats.act_quant(x, group).astype(x.dtype)

    def fp4(self, x: Array, kind: str) -> Array:
        """E2M1 fake quantisation in groups of 32 (SPEC 2.0)."""
        if self.measure:
            self._note(x, formats.fp4_scale(x), 32, formats.E2M1_MAGNITUDES, kind, 6)
        return formats.fp4_act_quant(x).astype(x.dtype)

    def top(self, scores: Array, k: int, kind: str) -> np.ndarray:
        """Indices of the k largest of a vector, ascending; a tie goes to the lower index."""
        order = np.argsort(-scores, kind="stable")
        if self.measure and k < len(scores):
            gap = scores[order[k - 1]] - scores[order[k]]
            self._margin(kind).add(np.array([gap / np.abs(scores).max()]))
        return np.sort(order[:k])

    def report(self) -> str:
        """One line a kind."""
        return "\n".join(
            f"{kind:12} smallest margin {m.smallest:.2e} of {m.decisions} decisions, within {m.within}"
            for kind, m in sorted(self.margins.items())
        )

    def _margin(self, kind: str) -> Margin:
        return self.margins.setdefault(kind, Margin())

    def _note(self, x: Array, scale: Array, group: int, table: Array, kind: str, top: float) -> None:
        amax = formats.group_amax(x, group)
        live = amax > 1e-4
        mantissa = np.frexp(amax[live] / top)[0]
        self._margin("scale").add(np.minimum(mantissa - 0.5, 1 - mantissa))
        scaled = np.abs(x).reshape(*amax.shape, group) / scale[..., None]
        middles = (table[1:] + table[:-1]) / 2
        right = np.clip(np.searchsorted(middles, scaled), 1, len(middles) - 1)
        near = np.where(scaled - middles[right - 1] < middles[right] - scaled, right - 1, right)
        reach = (amax / scale)[..., None]
        distance = np.abs(scaled - middles[near]) / reach
        self._margin(kind).add(distance[live])
