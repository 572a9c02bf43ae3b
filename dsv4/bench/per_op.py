"""Which op a kernel belongs to: by its name, from the `__global__` functions of each op's sources."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
_GLOBAL = re.compile(r"__global__\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?void\s+(?:__\w+__\s*\([^)]*\)\s*)*(\w+)\s*\(")
_ALSO = re.compile(r"__global__\s+void\s+__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)\s*(\w+)\s*\(")


@dataclass(frozen=True)
class OpTime:
    """Kernels of one op in one step, and their time. `gaps` is what no kernel covers."""

    op: str
    launches: int
    us: float


@cache
def kernel_owners() -> dict[str, str]:
    """Name of every `__global__` function -> the op whose folder it is in (or the header, for shared ones)."""
    owners: dict[str, str] = {}
    for path in sorted(KERNELS.rglob("*.cu*")):
        source = path.read_text(encoding="utf-8")
        owner = path.parent.name if path.suffix == ".cu" else path.stem
        for name in (*_GLOBAL.findall(source), *_ALSO.findall(source)):
            owners[name] = owner
    return owners


def owner_of(kernel: str) -> str:
    """The op of a kernel by the name that a profiler gives it: `void dsv4::router<6>(...)` -> `router`."""
    if kernel.startswith(("Memcpy", "Memset")):
        return kernel.split()[0].lower()
    owners = kernel_owners()
    plain = kernel.split("(")[0] if not kernel.startswith("(") else kernel
    for word in re.findall(r"\w+", kernel.replace("(anonymous namespace)", "")):
        if word in owners:
            return owners[word]
    return "torch: " + (re.findall(r"(\w+)(?:<|$)", plain) or [kernel])[-1][:40]


def by_op(kernels: Sequence[tuple[str, float]]) -> list[OpTime]:
    """(name, us) of a step's kernels, summed per op, the longest first."""
    sums: dict[str, list[float]] = {}
    for name, us in kernels:
        sums.setdefault(owner_of(name), []).append(us)
    return sorted((OpTime(op, len(us), sum(us)) for op, us in sums.items()), key=lambda op: -op.us)
