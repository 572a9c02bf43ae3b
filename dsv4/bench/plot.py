"""The CSV of `dsv4 bench decode` as a picture: an SVG file, written without any library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from dsv4.bench.report import read_csv
from dsv4.errors import RequestError

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 420, 70, 230, 40, 50
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#bf3989", "#57606a", "#0a7ea4")


def plot(csv: Path, out: Path) -> None:
    """Draw share of copy bandwidth over the batch, a line per model, layers, act and context. The last row of a point
    counts."""
    rows = read_csv(csv)
    if not rows:
        raise RequestError(f"{csv}: no rows to draw")
    out.write_text(svg(rows, csv.stem), encoding="utf-8")


def lines(rows: Sequence[Mapping[str, str]]) -> dict[str, dict[int, float]]:
    """Name of a line -> share by batch."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        name = f"{row['model']}, {row['layers']} layers, {row['act']}, {int(row['context']):,} tokens"
        found.setdefault(name, {})[int(row["batch"])] = float(row["share"])
    return {name: dict(sorted(points.items())) for name, points in found.items()}


def svg(rows: Sequence[Mapping[str, str]], title: str) -> str:
    """The whole picture as text."""
    found = lines(rows)
    batches = sorted({batch for points in found.values() for batch in points})
    top = max(0.1, math.ceil(max(share for points in found.values() for share in points.values()) * 10) / 10)
    low, high = math.log2(batches[0]), max(math.log2(batches[-1]), math.log2(batches[0]) + 1)

    def x(batch: int) -> float:
        return LEFT + (math.log2(batch) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(share: float) -> float:
        return HEIGHT - BOTTOM - share / top * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>',
        label(LEFT, 20, title, "start"),
        label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "batch", "middle"),
        label(12, TOP - 8, "share of copy bandwidth", "start"),
    ]
    for tenth in range(round(top * 10) + 1):
        parts.append(f'<path d="M{LEFT} {y(tenth / 10):.1f}H{WIDTH - RIGHT}" stroke="#d0d7de"/>')
        parts.append(label(LEFT - 8, y(tenth / 10) + 4, f"{tenth * 10} %", "end"))
    parts += [label(x(batch), HEIGHT - BOTTOM + 18, str(batch), "middle") for batch in batches]
    for place, (name, points) in enumerate(found.items()):
        colour = COLOURS[place % len(COLOURS)]
        path = " ".join(f"{x(batch):.1f},{y(share):.1f}" for batch, share in points.items())
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(b):.1f}" cy="{y(s):.1f}" r="3" fill="{colour}"/>' for b, s in points.items()]
        words = name.split(", ", 1)
        parts.append(label(WIDTH - RIGHT + 12, TOP + 34 * place, words[0], "start", colour))
        parts.append(label(WIDTH - RIGHT + 12, TOP + 34 * place + 14, words[1], "start", colour))
    return "\n".join([*parts, "</svg>"]) + "\n"


def label(x: float, y: float, words: str, anchor: str, colour: str = "#1f2328") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'
