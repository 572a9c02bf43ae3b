"""What a bench gives back: rows for a table, a CSV that grows, and one JSON document on the last line."""

from __future__ import annotations

import csv
import datetime
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dsv4.errors import RequestError

COLUMNS = tuple("model layers tp batch context act us_per_step bytes gb_s share kernels gpu commit command".split())
OP_COLUMNS = tuple(
    "model layers batch context act op shape calls us bytes weight_bytes gb_s share gpu commit command".split()
)
GEMM_COLUMNS = tuple("model layers tp rows act op shape calls us flop tflop_s dense_share gpu commit command".split())
WATERFALL_COLUMNS = tuple(
    "model layers tp batch context act op shape launches us_per_launch us_per_layer us gap_us bytes gb_s share own_us "
    "block_us gpu commit command".split()
)
PROMPT_COLUMNS = tuple(
    "model layers tp context chunk act op shape calls us_per_call us_per_layer us time_share flop tflop_s dense_share "
    "bytes gb_s share ahead_us gpu commit command".split()
)


@dataclass(frozen=True)
class Run:
    """What all rows of one run share. tp: ranks; bytes and speeds are those of one of them, of experts the mean one.
    copy_gb_s: the copy bandwidth measured in this run. experts: how ranks divide them.
    """

    model: str
    layers: int
    tp: int
    act: str
    gpu: str
    copy_gb_s: float
    commit: str
    command: str
    experts: str = "tp"

    @property
    def ranks(self) -> str:
        """`2`, or `2 ep` where experts are divided otherwise: the CSV's `tp`."""
        return f"{self.tp}" if self.experts == "tp" else f"{self.tp} {self.experts}"


@dataclass(frozen=True)
class Row:
    """One measurement. values: the columns of the CSV that Run does not give. more: what only the JSON has.

    picture: an SVG, for a file of its own.
    """

    run: Run
    values: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)
    picture: str | None = None

    @property
    def columns(self) -> dict[str, Any]:
        about = {key: value for key, value in vars(self.run).items() if key != "copy_gb_s"}
        return about | {"tp": self.run.ranks} | self.values


def speed(nbytes: float, us: float, copy_gb_s: float) -> dict[str, float]:
    """gb_s (10^9 bytes a second) and share (of the copy bandwidth) of `nbytes` moved in `us`."""
    gb_s = nbytes / us * 1e-3
    return {"gb_s": round(gb_s, 1), "share": round(gb_s / copy_gb_s, 4)}


def rate(flop: float, us: float, dense_tflop_s: float) -> dict[str, float]:
    """tflop_s (10^12 operations a second) and dense_share (of the dense product's rate) of `flop` done in `us`."""
    tflop_s = flop / us * 1e-6
    return {"tflop_s": round(tflop_s, 1), "dense_share": round(tflop_s / dense_tflop_s, 4)}


def slug(gpu: str) -> str:
    """The folder of a GPU: `NVIDIA H200` -> `h200`."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia")).strip("-")


def this_commit() -> str:
    """The commit this package was run from, with `+` if files differ from it; `unknown` outside a repository."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=30)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short", "HEAD")
        return commit + ("+" if commit and git("status", "--porcelain") else "") or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def this_command() -> str:
    return shlex.join(["dsv4", *sys.argv[1:]])


def write_csv(folder: Path, what: str, rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> Path | None:
    """Append to `folder/<gpu>/<today>-bench-<what>.csv`, with a header if it is new; None without rows."""
    if not rows:
        return None
    path = results_file(folder, rows[0].run, f"bench-{what}.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    if not new and path.read_text().partition("\n")[0].split(",") != list(columns):
        raise RequestError(f"{path}: its header is not {','.join(columns)}; move it away or give another --results")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="raise", lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({name: row.columns[name] for name in columns})
    return path


def results_file(folder: Path, run: Run, name: str) -> Path:
    """`folder/<gpu>/<today>-name`."""
    return folder / slug(run.gpu) / f"{datetime.date.today().isoformat()}-{name}"


def write_picture(folder: Path, what: str, row: Row) -> Path | None:
    """The row's picture in `folder/<gpu>`, named by what was measured; it replaces an older one of the same day."""
    if row.picture is None:
        return None
    run, values = row.run, row.values
    subject = f"{run.model}-{run.layers}-tp{run.ranks}-{run.act}-batch{values['batch']}-context{values['context']}"
    path = results_file(folder, run, f"{what}-{slug(subject)}.svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(row.picture, encoding="utf-8")
    return path


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a bench's CSV. Raises RequestError for another file."""
    if not path.is_file():
        raise RequestError(f"{path}: no such file; expected a CSV that dsv4 bench wrote")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise RequestError(f"{path}: its columns are not those of dsv4 bench decode or prefill")
        return list(reader)


def table(title: str, rows: Sequence[Mapping[str, Any]], right: Sequence[str], left: Sequence[str] = ()) -> Table:
    """`left` columns as text, `right` ones as numbers."""
    shown = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for name in left:
        shown.add_column(name, no_wrap=True)
    for name in right:
        shown.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(*(text(name, row.get(name)) for name in (*left, *right)))
    return shown


def text(name: str, value: Any) -> str:
    """A cell: shares in percent, bytes in MB, None as a dash."""
    if value is None or value == "":
        return "-"
    if name.endswith("share"):
        return f"{value:.1%}"
    if name.endswith("bytes"):
        return f"{value / 1e6:,.1f} MB"
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def console() -> Console:
    """stdout, wide enough for a table when it is a pipe."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=200)


def json_line(what: str, rows: Sequence[Row], **more: Any) -> str:
    """One line: the run, and every row with all it has."""
    about = vars(rows[0].run) if rows else {}
    document = {"bench": what, **about, **more, "rows": [{**row.values, **row.more} for row in rows]}
    return json.dumps(document, ensure_ascii=False, allow_nan=False)
