"""The kernel pack: every op compiled ahead of time into one library for all targets, with a manifest beside it."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from dsv4.errors import KernelError
from dsv4.kernels.compiler import (
    ARCHS,
    BUILD_COMMAND,
    FLAGS,
    FOLDER,
    check_archs,
    compile_command,
    find_nvcc,
    nvcc_version,
    ops_with_kernels,
    run_compiler,
    source_hash,
    source_of,
    symbol,
    targets,
)

#: Where `make kernels` writes and a wheel carries it; `DSV4_KERNEL_PACK` names another folder.
DEFAULT_FOLDER = FOLDER / "lib"
LIBRARY, MANIFEST = "dsv4_kernels.so", "dsv4_kernels.json"


@dataclass(frozen=True)
class Entry:
    """One op of a pack."""

    op: str
    symbol: str
    source_hash: str


@dataclass(frozen=True)
class Manifest:
    """What a pack was made of."""

    archs: tuple[str, ...]
    nvcc: str
    flags: tuple[str, ...]
    ops: tuple[Entry, ...]


def pack_folder() -> Path:
    return Path(os.environ.get("DSV4_KERNEL_PACK") or DEFAULT_FOLDER)


def build(
    out: Path | None = None,
    archs: Sequence[str] = ARCHS,
    ops: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Compile `ops` (all that have a kernel) in parallel, link one library into `out`, write its manifest.

    Built aside and renamed into place, library first: a reader never meets half a pack.
    """
    archs, nvcc = check_archs(archs), find_nvcc()
    out, names = out or pack_folder(), list(ops or ops_with_kernels())
    hashes = {op: source_hash(op) for op in names}  # before compiling: a source edited meanwhile makes the pack stale
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".build-") as temporary:
        work = Path(temporary)

        def compiled(op: str) -> Path:
            target = work / f"{op}.o"
            run_compiler(op, compile_command(nvcc, source_of(op), target, archs, shared=False))
            progress(f"{op}: {', '.join(archs)}")
            return target

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = list(pool.map(compiled, names))
        link = [str(nvcc), "--shared", *targets(archs), "-o", str(work / LIBRARY), *map(str, objects)]
        run_compiler("(linking the pack)", link)
        entries = tuple(Entry(op, symbol(op), hashes[op]) for op in names)
        manifest = Manifest(archs, nvcc_version(nvcc), FLAGS, entries)
        (work / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n")
        for name in (LIBRARY, MANIFEST):
            (work / name).replace(out / name)
    return manifest


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of the pack in `folder`; None when there is no pack."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text())
        ops = tuple(Entry(**entry) for entry in raw["ops"])
        return Manifest(tuple(raw["archs"]), raw["nvcc"], tuple(raw["flags"]), ops)
    except (ValueError, KeyError, TypeError) as error:
        raise KernelError(f"{path} is not a pack's manifest ({error}); rebuild it: {BUILD_COMMAND}") from error


def missing(manifest: Manifest | None, op: str, arch: str) -> str | None:
    """Why a pack cannot serve an op on a target, in words; None when it can."""
    if manifest is None:
        return "there is no pack"
    if arch not in manifest.archs:
        return f"the pack was built for {', '.join(manifest.archs)}, not for {arch}"
    entry = next((entry for entry in manifest.ops if entry.op == op), None)
    if entry is None:
        return f"the pack does not hold '{op}'"
    if entry.source_hash != source_hash(op):
        return f"the pack was built from other sources of '{op}'"
    return None


@functools.cache
def library(folder: Path) -> ctypes.CDLL:
    path = folder / LIBRARY
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(f"the kernel pack {path} cannot be loaded ({error}); rebuild it: {BUILD_COMMAND}") from error
