"""From an op's CUDA source to machine code: which files, which flags, which compiler, which targets."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from dsv4.errors import KernelError

FOLDER = Path(__file__).parent
INCLUDE = FOLDER / "include"
ARCHS = ("sm_90a", "sm_100a", "sm_103a", "sm_120a")
#: Denormals, division and square root as IEEE says (nvcc's default): a kernel must agree with its twin.
FLAGS = ("-O3", "-std=c++17", "-lineinfo", "-Xcompiler", "-fPIC")
BUILD_COMMAND = "dsv4 kernels build"
_INCLUDE_LINE = re.compile(r"^\s*#\s*include\s*[<\"](dsv4/[^>\"]+)[>\"]", re.MULTILINE)


def ops_with_kernels() -> list[str]:
    """Names of the ops whose folder holds a CUDA source."""
    return sorted(path.parent.name for path in FOLDER.glob("*/*.cu") if path.stem == path.parent.name)


def symbol(op: str) -> str:
    """The exported launcher of an op."""
    return f"dsv4_{op}"


def source_of(op: str, folder: Path = FOLDER) -> Path:
    path = folder / op / f"{op}.cu"
    if not path.is_file():
        raise KernelError(
            f"op '{op}' has no CUDA source in this build; ops that have one: {', '.join(ops_with_kernels())}"
        )
    return path


def transitive_includes(source: Path, include: Path = INCLUDE) -> list[Path]:
    """Our own headers that `source` reaches, sorted; what comes with the compiler is covered by its version."""
    found: set[Path] = set()
    pending = [source]
    while pending:
        path = pending.pop()
        for name in _INCLUDE_LINE.findall(path.read_text()):
            header = include / name
            if not header.is_file():
                raise KernelError(f"{path.name} includes {name}, which does not exist in {include}")
            if header not in found:
                found.add(header)
                pending.append(header)
    return sorted(found)


def source_hash(op: str, folder: Path = FOLDER) -> str:
    """SHA-256 over the op's source and its headers, names and contents, and the flags."""
    source = source_of(op, folder)
    digest = hashlib.sha256("\0".join(FLAGS).encode())
    for path in [source, *transitive_includes(source, folder / "include")]:
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def find_nvcc() -> Path:
    """$CUDA_HOME/bin/nvcc if CUDA_HOME is set, else the nvcc on PATH."""
    home = os.environ.get("CUDA_HOME")
    if home:
        path = Path(home) / "bin" / "nvcc"
        if os.access(path, os.X_OK):
            return path
        raise KernelError(f"CUDA_HOME is {home}, but there is no nvcc in its bin folder; correct CUDA_HOME or unset it")
    on_path = shutil.which("nvcc")
    if on_path is None:
        raise KernelError(
            "no CUDA compiler: nvcc is neither on PATH nor in $CUDA_HOME/bin; install the CUDA toolkit (12.9 or newer) "
            "or set CUDA_HOME, or install a dsv4 wheel, which carries compiled kernels"
        )
    return Path(on_path)


@functools.cache
def _version(nvcc: Path, mtime_ns: int) -> str:
    result = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    if result.returncode:
        raise KernelError(f"{nvcc} --version failed: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout.strip().splitlines()[-1]


def nvcc_version(nvcc: Path) -> str:
    """The build line of `nvcc --version`."""
    return _version(nvcc, nvcc.stat().st_mtime_ns)


def check_archs(archs: Sequence[str]) -> tuple[str, ...]:
    unknown = [arch for arch in archs if arch not in ARCHS]
    if unknown or not archs:
        raise KernelError(f"unknown target {', '.join(unknown) or '(none)'}; known: {', '.join(ARCHS)}")
    return tuple(archs)


def targets(archs: Sequence[str]) -> list[str]:
    return [f"-gencode=arch={arch.replace('sm_', 'compute_')},code={arch}" for arch in archs]


def compile_command(nvcc: Path, source: Path, output: Path, archs: Sequence[str], *, shared: bool) -> list[str]:
    """One source to a shared library, or to an object that a pack links."""
    include = source.parents[1] / "include"
    what = "--shared" if shared else "--compile"
    return [str(nvcc), what, *FLAGS, f"-I{include}", *targets(archs), "-o", str(output), str(source)]


def run_compiler(op: str, command: Sequence[str]) -> str:
    """Run it and return what it printed."""
    result = subprocess.run(command, capture_output=True, text=True)
    log = "\n".join(part for part in (" ".join(command), result.stdout.strip(), result.stderr.strip()) if part)
    if result.returncode:
        raise KernelError(f"op '{op}' does not compile (exit status {result.returncode}):\n{log}")
    return log
