"""Which op a kernel belongs to: by its name, from the `__global__` functions of each op's sources."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
_GLOBAL = re.compile(r"__global__\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?void\s+(?:__\w+__\s*\([^)]*\)\s*)*(\w+)\s*\(")
_ALSO = re.compile(r"__global__\s+void\s+__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)\s*(\w+)\s*\(")
_NAMELESS = "(anonymous namespace)::"


@cache
def kernel_owners() -> dict[str, str]:
    """Name of every `__global__` function -> the op whose folder it is in.

    One in a header is of the op that has the header's name, or of the only op that includes it.
    """
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(KERNELS.rglob("*.cu*"))}
    ops = {path.parent.name: text for path, text in sources.items() if path.suffix == ".cu"}
    owners: dict[str, str] = {}
    for path, text in sources.items():
        owner = path.parent.name if path.suffix == ".cu" else path.stem
        users = [op for op, source in ops.items() if f"<dsv4/{path.name}>" in source]
        if owner not in ops and len(users) == 1:
            [owner] = users
        for name in (*_GLOBAL.findall(text), *_ALSO.findall(text)):
            owners[name] = owner
    return owners


def owner_of(kernel: str) -> str:
    """The op of a kernel by the name that a profiler gives it: `void dsv4::router<6>(...)` -> `router`."""
    if kernel.startswith(("Memcpy", "Memset")):
        return kernel.split()[0].lower()
    return kernel_owners().get(own_name(kernel)) or "torch: " + foreign_name(kernel)


def own_name(kernel: str) -> str:
    """The function alone: `void dsv4::moe::few<true>(...)` -> `few`."""
    plain = re.split(r"[<(]", kernel.replace(_NAMELESS, ""))[0]
    return plain.split("::")[-1].split()[-1] if plain.strip() else kernel


def foreign_name(kernel: str) -> str:
    """What says most of a kernel that is none of ours: of PyTorch's, often one of its template's arguments."""
    telling = re.findall(r"\w*kernel\w*", kernel.replace(_NAMELESS, "").split("(")[0])
    return str(telling[-1] if telling else own_name(kernel))[:40]
