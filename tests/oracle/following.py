"""Follow an engine past its roundings: the walk-through takes the engine's own inputs where a step decides.

Quantisation makes a deep model chaotic: one value that lies within float32 noise of a rounding boundary falls on the
other side, moves its neighbours by a step of the format, and from there on two right implementations part. So the long
comparisons do this instead. The engine's quantiser inputs are recorded. Wherever the walk-through would quantise, it
looks up the row the engine quantised there, demands that it equals its own row within `tolerance`, rounds the
engine's row by its own definition, and goes on from that. A wrong value is still an error at the first place it
appears, and a rounding that differs is only accepted where float32 noise explains it.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from . import formats
from .formats import Array
from .rounding import Rounder

_NEAR = 8  # candidates on each side in the order of projections


class Mismatch(AssertionError):
    """The engine quantised no row like the one the walk-through has."""


class _Rows:
    """Recorded rows of one width, found again by value."""

    def __init__(self, rows: Array) -> None:
        self.direction = np.random.default_rng(7).standard_normal(rows.shape[1])
        projections = rows @ self.direction
        order = np.argsort(projections)
        self.rows, self.projections = rows[order], projections[order]

    def closest(self, x: Array) -> tuple[Array, Array]:
        """x [n, K] -> nearest recorded rows [n, K] and their largest deviation [n]."""
        start = np.searchsorted(self.projections, x @ self.direction)
        best, deviation = np.empty_like(x), np.full(len(x), np.inf)
        for step in range(-_NEAR, _NEAR):
            candidate = self.rows[np.clip(start + step, 0, len(self.rows) - 1)]
            distance = np.abs(candidate - x).max(-1)
            better = distance < deviation
            best[better], deviation[better] = candidate[better], distance[better]
        return best, deviation


class FollowingRounder(Rounder):
    """A rounder that continues from the recorded inputs; `record` them first, then run the walk-through."""

    def __init__(self, tolerance: float = 1e-5) -> None:
        super().__init__(measure=True)
        self.tolerance = tolerance
        self.recorded: dict[tuple[str, int, int], list[Array]] = defaultdict(list)
        self.tables: dict[tuple[str, int, int], _Rows] = {}
        self.decisions = 0
        self.flips = 0  # values that the engine's input and the walk-through's round to different sides
        self.largest_deviation = 0.0

    def record(self, form: str, x: Array, group: int) -> None:
        """Note one quantiser call of the engine: form `act` or `fp4`, its input [..., K] as float64."""
        self.recorded[form, group, x.shape[-1]].append(x.reshape(-1, x.shape[-1]))

    def act(self, x: Array, group: int, kind: str) -> Array:
        """E4M3 fake quantisation of the engine's row nearest to x."""
        return self._follow("act", x, group, formats.act_quant, kind)

    def fp4(self, x: Array, kind: str) -> Array:
        """E2M1 fake quantisation of the engine's row nearest to x."""
        return self._follow("fp4", x, 32, formats.fp4_act_quant, kind)

    def _follow(self, form: str, x: Array, group: int, quantise, kind: str) -> Array:
        if x.size == 0:
            return x
        key = form, group, x.shape[-1]
        if key not in self.tables:
            if key not in self.recorded:
                raise Mismatch(f"the engine never quantised rows of width {key[2]} as {form} in groups of {group}")
            self.tables[key] = _Rows(np.concatenate(self.recorded[key]))
        own = x.reshape(-1, x.shape[-1])
        rows, deviation = self.tables[key].closest(own)
        relative = deviation / np.maximum(np.abs(own).max(-1), 1e-30)
        worst = int(relative.argmax())
        if relative[worst] > self.tolerance:
            raise Mismatch(
                f"{kind}: row {worst} of {len(own)} (width {key[2]}, groups of {group}) has no counterpart in the "
                f"engine; the nearest differs by {relative[worst]:.2e} of its largest value, allowed {self.tolerance:g}"
            )
        self.largest_deviation = max(self.largest_deviation, float(relative[worst]))
        rounded = quantise(rows, group)
        self.decisions += own.size
        self.flips += int((rounded != quantise(own, group)).sum())
        return rounded.reshape(x.shape)
