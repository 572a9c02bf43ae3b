"""Layers of a step or prompt as a picture: a bar per launch, phase or call on a time axis, SVG without any library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dsv4.bench.plot import label
from dsv4.bench.report import Run
from dsv4.bench.waterfall import Bar, layers_of
from dsv4.config import ModelConfig

WIDTH, LEFT, RIGHT, LINE, HEAD, AXIS = 1100, 290, 110, 18, 26, 34
LIGHT, DARK, FLOOR, GAP, GRID = "#b6d4fb", "#1f6feb", "#d1242f", "#f2cc60", "#d0d7de"
LEGEND = {
    LIGHT: "running or waiting",
    DARK: "what it adds",
    GAP: "gap, or blocks meeting",
    FLOOR: "bytes at copy bandwidth",
}
STEPS = tuple(part * 10**power for power in range(6) for part in (1, 2, 5))  # microseconds between grid lines
MOST_LINES = 12


def picture(step: Sequence[Bar], config: ModelConfig, run: Run, what: str) -> str | None:
    """The last layer of each kind, drawn; None for a step whose layers cannot be told apart."""
    found = layers_of(step)
    if len(found) != len(config.layers):
        return None
    last = {spec.kind: place for place, spec in enumerate(config.layers)}
    shown = {f"layer {place}, {kind}": found[place] for kind, place in sorted(last.items(), key=lambda item: item[1])}
    ranks = f", one of {run.ranks} ranks" if run.tp > 1 else ""
    title = f"{run.model}, {run.layers} layers{ranks}, {what}, act={run.act}; {run.gpu}"
    return svg(shown, run.copy_gb_s, title)


def svg(layers: Mapping[str, Sequence[Bar]], copy_gb_s: float, title: str) -> str:
    """A panel per layer, all on one scale. Light: from a kernel's start to its end. Dark: what it adds to the step.
    Red: where that would end if its bytes moved at copy bandwidth. Yellow: nothing ran in front of it, or blocks met.
    """
    spans = [_span(step) for step in layers.values()]
    longest = max((last - first for first, last in spans), default=1.0)
    scale = (WIDTH - LEFT - RIGHT) / max(longest, 1e-9)
    parts, y = [label(12, 20, title, "start"), *_legend(36)], 52
    for (name, step), (first, last) in zip(layers.items(), spans, strict=True):
        parts += _panel(name, step, first, last, y, scale, copy_gb_s)
        y += HEAD + LINE * len(step) + AXIS
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" font-family="sans-serif" font-size="12">'
        '<rect width="100%" height="100%" fill="white"/>'
    )
    return "\n".join([head, *parts, "</svg>"]) + "\n"


def _span(step: Sequence[Bar]) -> tuple[float, float]:
    return min(min(bar.start, bar.before) for bar in step), max(bar.end for bar in step)


def _panel(
    name: str, step: Sequence[Bar], first: float, last: float, top: float, scale: float, copy_gb_s: float
) -> list[str]:
    zero = step[0].before  # the end of what is in front of the layer
    bottom = top + HEAD + LINE * len(step)

    def x(us: float) -> float:
        return LEFT + (us - first) * scale

    adds = sum(bar.visible for bar in step)
    parts = [label(12, top + 16, f"{name}: {adds:.1f} us", "start"), label(WIDTH - 12, top + 16, "us (floor)", "end")]
    grid = next((step for step in STEPS if (last - first) / step <= MOST_LINES), STEPS[-1])
    for tick in range(-(-int(first - zero) // grid), int((last - zero) // grid) + 1):
        at = x(zero + tick * grid)
        parts.append(f'<path d="M{at:.1f} {top + HEAD}V{bottom}" stroke="{GRID}"/>')
        parts.append(label(at, bottom + 14, str(tick * grid), "middle"))
    for place, bar in enumerate(step):
        y = top + HEAD + LINE * place
        seen, floor = max(bar.start, bar.before), bar.nbytes / copy_gb_s * 1e-3
        parts.append(label(LEFT - 8, y + 13, bar.name, "end"))
        if bar.gap:
            parts.append(_bar(x(bar.before), x(bar.start), y, GAP))
        parts.append(_bar(x(bar.start), x(bar.end), y, LIGHT))
        if bar.end > seen:
            parts.append(_bar(x(seen), x(bar.end), y, DARK))
        words = f"{bar.visible:.1f}"
        if bar.nbytes:
            words += f" ({floor:.1f})"
            at = x(seen + floor)
            parts.append(f'<path d="M{at:.1f} {y + 1}V{y + LINE - 1}" stroke="{FLOOR}" stroke-width="2"/>')
        parts.append(label(WIDTH - 12, y + 13, words, "end"))
    return parts


def _legend(y: float) -> list[str]:
    parts, x = [], 12.0
    for colour, words in LEGEND.items():
        parts.append(f'<rect x="{x}" y="{y - 9}" width="14" height="10" fill="{colour}"/>')
        parts.append(label(x + 20, y, words, "start"))
        x += 40 + 7 * len(words)
    return parts


def _bar(left: float, right: float, y: float, colour: str) -> str:
    return (
        f'<rect x="{left:.1f}" y="{y + 2}" width="{max(right - left, 0.5):.1f}" height="{LINE - 4}" fill="{colour}"/>'
    )
