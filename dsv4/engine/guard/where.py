"""Which Python line, on which thread, is behind a call that a library has just made."""

from __future__ import annotations

import sys
import sysconfig
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_GUARD = str(Path(__file__).parent) + "/"
_ROOT = Path(__file__).resolve().parents[3]
_TORCH = str(Path(torch.__file__).parent) + "/"
_STDLIB = tuple(sysconfig.get_paths()[name] + "/" for name in ("stdlib", "platstdlib"))
# Every launch passes through these; the line of interest is the one that called them.
_MACHINERY = (str(_ROOT / "dsv4/kernels/loader.py"), str(_ROOT / "dsv4/kernels/op.py"))
_DEEP = 200  # frames looked at
_SHOWN = 8  # places kept


@dataclass(frozen=True)
class Where:
    """`stack`: places as file:line function, innermost first, torch and the standard library left out. `thread` is
    empty where nobody told which it was.
    """

    stack: tuple[str, ...]
    thread: str = ""

    @property
    def place(self) -> str:
        return self.stack[0].split(" ")[0] if self.stack else "no Python frame"

    def __str__(self) -> str:
        return self.place if self.thread in ("", "MainThread") else f"{self.place} on thread {self.thread}"

    def as_json(self) -> dict[str, Any]:
        return {"place": self.place, "thread": self.thread, "stack": list(self.stack)}


def is_internal(filename: str) -> bool:
    """Does this file belong to torch, the standard library or the guard, or to no file at all?"""
    if filename.startswith(("<", _GUARD, _TORCH)) or filename in _MACHINERY:
        return True
    installed = "/site-packages/" in filename or "/dist-packages/" in filename
    return filename.startswith(_STDLIB) and not installed


def shown_path(filename: str) -> str:
    """Relative to the repository or the working directory, else the last three parts: reports name no machine."""
    path = Path(filename)
    for base in (_ROOT, Path.cwd()):
        if path.is_relative_to(base):
            return path.relative_to(base).as_posix()
    return "/".join(path.parts[-3:])


def places(frames: Iterable[tuple[str, int, str]]) -> tuple[str, ...]:
    """(file, line, function), innermost first -> the stack of a Where. Where all is internal, its innermost line."""
    seen = list(frames)
    outside = [frame for frame in seen if not is_internal(frame[0])]
    chosen = outside or [frame for frame in seen if not frame[0].startswith(("<", _GUARD))][:1]
    return tuple(f"{shown_path(file)}:{line} {function}" for file, line, function in chosen[:_SHOWN])


def frames_here() -> Iterator[tuple[str, int, str]]:
    """The frames of this thread, innermost first."""
    frame = sys._getframe(1)
    for _ in range(_DEEP):
        yield frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        if frame.f_back is None:
            return
        frame = frame.f_back


def here(frames: Callable[[], Iterable[tuple[str, int, str]]] = frames_here) -> Where:
    """Where this thread is, seen from inside a callback that a library called on it."""
    stack = places(frames())
    return Where(stack, threading.current_thread().name if stack else _native_name())


def _native_name() -> str:
    """A thread that Python did not start: its number, and the name its library gave it."""
    number = threading.get_native_id()
    try:
        name = Path(f"/proc/self/task/{number}/comm").read_text().strip()
    except OSError:
        name = "unnamed"
    return f"{name} (native thread {number}, not started by Python)"
