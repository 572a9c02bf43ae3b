"""From a CUDA source to a shared library for this processor, once per content."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from dsv4.kernels.compiler import FOLDER, source_of, transitive_includes
from tools.emulate.translate import translated

SHIM = Path(__file__).parent / "include"
FLAGS = (
    "-O1", "-std=c++17", "-fPIC", "-shared", "-w", "-fno-exceptions",
    "-fno-strict-aliasing", "-fwrapv", "-ffp-contract=off",
)  # fmt: skip


class CompileError(Exception):
    """What g++ said."""


def library_of(op: str, folder: Path = FOLDER) -> ctypes.CDLL:
    """An op's kernels and launchers. folder: the kernels of a tree."""
    return library(source_of(op, folder), folder / "include")


def library(source: Path, include: Path) -> ctypes.CDLL:
    """include: where its own headers lie."""
    texts = {Path(source.name): translated(source.read_text(), str(source))}
    for header in transitive_includes(source, include):
        texts[header.relative_to(include)] = translated(header.read_text(), str(header))
    digest = hashlib.sha256("\0".join(FLAGS).encode())
    for path, text in [*texts.items(), *((path, path.read_text()) for path in sorted(SHIM.glob("*.h")))]:
        digest.update(f"\0{path}\0{text}".encode())
    made = cache_folder() / f"{source.stem}-{digest.hexdigest()[:16]}.so"
    made.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{made}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            _compile(source.name, texts, made)
    return ctypes.CDLL(str(made))


def cache_folder() -> Path:
    """$DSV4_EMULATION_CACHE, else one of this user's in the folder for what is not kept."""
    named = os.environ.get("DSV4_EMULATION_CACHE")
    return Path(named) if named else Path(tempfile.gettempdir()) / f"dsv4-emulation-{os.getuid()}"


def _compile(name: str, texts: dict[Path, str], made: Path) -> None:
    if shutil.which("g++") is None:
        raise CompileError(f"{name} is compiled by g++ to run on this processor, and there is none on PATH; install it")
    work = Path(tempfile.mkdtemp(dir=made.parent))
    try:
        for path, text in texts.items():
            (work / path).parent.mkdir(parents=True, exist_ok=True)
            (work / path).write_text(text)
        command = ["g++", *FLAGS, f"-I{work}", f"-I{SHIM}", "-o", str(work / "made.so"), "-x", "c++", str(work / name)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise CompileError(f"{name} does not compile for this processor:\n{result.stderr[:20000]}")
        (work / "made.so").rename(made)
    finally:
        shutil.rmtree(work, ignore_errors=True)
