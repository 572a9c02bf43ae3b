"""Development builds: each op is compiled once per content and target into a folder that its hash names."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsv4.errors import KernelError
from dsv4.kernels.compiler import compile_command, find_nvcc, nvcc_version, run_compiler, source_hash, source_of, symbol


def cache_folder() -> Path:
    """$DSV4_KERNEL_CACHE, else `dsv4/kernels` in the user's cache folder."""
    named = os.environ.get("DSV4_KERNEL_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(base) / "dsv4" / "kernels"


def entry_name(op: str, arch: str, nvcc: Path) -> str:
    """<op>-<arch>-<hash12>; the hash covers source, transitive includes, flags, compiler and target."""
    key = "\0".join([source_hash(op), nvcc_version(nvcc), arch])
    return f"{op}-{arch}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def cached_library(op: str, arch: str) -> ctypes.CDLL:
    """The op's library for `arch`, compiled now if the cache lacks it; a broken entry is rebuilt and said so once."""
    nvcc, root = find_nvcc(), cache_folder()
    entry = root / entry_name(op, arch, nvcc)
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f"{entry.name}.lock"):
        if entry.exists():
            try:
                return _opened(op, entry)
            except KernelError as error:
                warnings.warn(f"rebuilding kernel cache entry {entry.name}: {error}", RuntimeWarning, stacklevel=2)
                shutil.rmtree(entry)
        _build(op, arch, nvcc, entry)
        return _opened(op, entry)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time per entry; the lock goes with the process that holds it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(op: str, arch: str, nvcc: Path, entry: Path) -> None:
    source = source_of(op)
    work = Path(tempfile.mkdtemp(dir=entry.parent, prefix=f".{entry.name}-"))
    try:
        log = run_compiler(op, compile_command(nvcc, source, work / "kernel.so", [arch], shared=True))
        shutil.copyfile(source, work / "kernel.cu")
        (work / "build.log").write_text(log + "\n")
        meta = {"op": op, "arch": arch, "nvcc": nvcc_version(nvcc), "sha256": _sha256(work / "kernel.so")}
        (work / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        work.rename(entry)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _opened(op: str, entry: Path) -> ctypes.CDLL:
    try:
        found, expected = _sha256(entry / "kernel.so"), json.loads((entry / "meta.json").read_text())["sha256"]
        if found != expected:
            raise KernelError(f"kernel.so has SHA-256 {found[:12]}, meta.json says {str(expected)[:12]}")
        library = ctypes.CDLL(str(entry / "kernel.so"))
        getattr(library, symbol(op))
        return library
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise KernelError(f"{type(error).__name__}: {error}") from error


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
