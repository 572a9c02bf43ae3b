"""`dsv4 kernels`: which ops have CUDA kernels, what was compiled from them, and the command that compiles them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsv4.cli.console import note, put
from dsv4.errors import KernelError

kernels = typer.Typer(help="List, build and show the CUDA kernels.", no_args_is_help=True)


@kernels.command("list")
def list_kernels() -> None:
    """Print every op with a kernel and the state of the kernel pack."""
    from dsv4.kernels import compiler, pack

    folder = pack.pack_folder()
    manifest = pack.read_manifest(folder)
    for op in compiler.ops_with_kernels():
        archs = manifest.archs if manifest else compiler.ARCHS
        reason = pack.missing(manifest, op, archs[0])
        put(f"{op:<16} {compiler.source_hash(op)[:12]}  {reason or 'in the pack: ' + ', '.join(archs)}", end="\n")
    note(f"pack folder: {folder}")


@kernels.command("build")
def build(
    arch: Annotated[
        list[str] | None, typer.Option(help="Target, as sm_90a; may be repeated.", show_default="all four")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to.", show_default="in the package, where it is found")
    ] = None,
) -> None:
    """Compile every kernel into one library for all targets. Needs nvcc, no GPU."""
    from dsv4.kernels import compiler, pack

    manifest = pack.build(out, arch or compiler.ARCHS, progress=note)
    put(str((out or pack.pack_folder()) / pack.LIBRARY), end="\n")
    note(f"{len(manifest.ops)} ops for {', '.join(manifest.archs)}; {manifest.nvcc}")


@kernels.command("show")
def show(op: Annotated[str, typer.Argument(help="An op's name; `dsv4 kernels list` prints them.")]) -> None:
    """Print what an op's kernel is made from and where its builds are."""
    from dsv4.kernels import cache, compiler, pack

    source = compiler.source_of(op)
    headers = compiler.transitive_includes(source)
    manifest = pack.read_manifest(pack.pack_folder())
    try:
        nvcc = compiler.find_nvcc()
        compiler_line = f"{nvcc} ({compiler.nvcc_version(nvcc)})"
    except KernelError as error:
        compiler_line = str(error)
    built = sorted(path.name for path in cache.cache_folder().glob(f"{op}-sm_*") if path.is_dir())
    lines = {
        "source": str(source.relative_to(compiler.FOLDER.parent)),
        "includes": ", ".join(header.relative_to(compiler.INCLUDE).as_posix() for header in headers),
        "symbol": compiler.symbol(op),
        "hash": compiler.source_hash(op),
        "flags": " ".join(compiler.FLAGS),
        "compiler": compiler_line,
        "cached": ", ".join(built) or "nothing",
    }
    for arch in compiler.ARCHS:
        lines[f"pack {arch}"] = pack.missing(manifest, op, arch) or "present"
    for name, value in lines.items():
        put(f"{name:<12} {value}", end="\n")
