"""Two channels: stdout carries what was asked for and nothing else, stderr everything that is said about it."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from rich.console import Console

_silent = False


def silence() -> None:
    """From now on nothing but errors is said: another process of the same command says it."""
    global _silent
    _silent, sys.stdout = True, open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives


def speaks() -> bool:
    """Whether this process is the one that writes results."""
    return not _silent


def stderr() -> Console:
    """A console on today's stderr; it wraps nothing, so that long lines survive a pipe."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """One line about the run."""
    if speaks():
        stderr().print(text, style="dim", markup=False)


def error(text: str) -> None:
    """A failure the user can do something about."""
    stderr().print(f"error: {text}", style="red", markup=False)


def put(text: str, end: str = "") -> None:
    """Output, at once."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def put_json(document: dict[str, Any]) -> None:
    """One JSON document. Numbers that JSON lacks are an error here rather than at the reader's."""
    put(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False), end="\n")
