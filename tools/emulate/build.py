"""From an op's CUDA source to a shared library for this processor, once per content."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tools.emulate.translate import translated

INCLUDE = Path(__file__).parent / "include"
FLAGS = (
    "-O1", "-std=c++17", "-fPIC", "-shared", "-fno-strict-aliasing", "-fwrapv", "-ffp-contract=off",
    "-fno-exceptions", "-w",
)  # fmt: skip


def library(op: str) -> ctypes.CDLL:
    """The op of the dsv4 that is imported."""
    from dsv4.kernels.compiler import INCLUDE as HEADERS
    from dsv4.kernels.compiler import source_of, transitive_includes

    source = source_of(op)
    digest = hashlib.sha256("\0".join(FLAGS).encode())
    texts = {Path(f"{op}.cu"): translated(source.read_text(), str(source))}
    for header in transitive_includes(source):
        texts[header.relative_to(HEADERS)] = translated(header.read_text(), str(header))
    own = {path.relative_to(INCLUDE): path.read_text() for path in sorted(INCLUDE.glob("*.h"))}
    for path, text in [*texts.items(), *own.items()]:
        digest.update(f"\0{path}\0{text}".encode())
    made = _folder() / f"{op}-{digest.hexdigest()[:16]}.so"
    made.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{made}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            _compile(op, texts, made)
    return ctypes.CDLL(str(made))


def _folder() -> Path:
    named = os.environ.get("DSV4_EMULATION_CACHE")
    return Path(named) if named else Path(tempfile.gettempdir()) / f"dsv4-emulation-{os.getuid()}"


def _compile(op: str, texts: dict[Path, str], made: Path) -> None:
    work = Path(tempfile.mkdtemp(dir=made.parent))
    try:
        for path, text in texts.items():
            (work / path).parent.mkdir(parents=True, exist_ok=True)
            (work / path).write_text(text)
        command = ["g++", *FLAGS, f"-I{work}", f"-I{INCLUDE}", "-o", str(work / "made.so"), "-x", "c++", str(work / f"{op}.cu")]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"op '{op}' does not compile for this processor:\n{result.stderr[:20000]}")
        (work / "made.so").rename(made)
    finally:
        shutil.rmtree(work, ignore_errors=True)
