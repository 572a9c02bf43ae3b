"""Whether two trees' kernels of a decode step give the same bits, whatever order their threads run in.

python -m tools.emulate compare OLD NEW --rows 1,2,5,8 --grid 16 --seeds 3
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.emulate", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    compare = commands.add_parser("compare", help="run both trees' programs and compare every bit")
    compare.add_argument("old", type=Path)
    compare.add_argument("new", type=Path)
    run = commands.add_parser("run", help="run one tree's programs and keep what they leave")
    run.add_argument("tree", type=Path)
    run.add_argument("into", type=Path)
    for command in (compare, run):
        command.add_argument("--rows", default="1,2,5,8")
        command.add_argument("--padding", type=int, default=0, help="rows of padding, where there are more rows")
        command.add_argument("--formats", default="nvfp4", help="of nvfp4, fp8, bf16")
        command.add_argument("--lists", default="short,long", help="short: small kernels will do")
        command.add_argument("--entries", default="0", help="of the indexer's rows; 0: few, 8193 and more: LONG")
        command.add_argument("--ranks", default="1", help="1: a rank that tells itself; 2: two side by side")
        command.add_argument("--grid", type=int, default=40, help="blocks; at least 8 for each row")
        command.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    return _run(given) if given.command == "run" else _compare(given)


def _run(given: argparse.Namespace) -> int:
    sys.path.insert(0, str(given.tree.resolve()))
    from tools.emulate.programs import left_by, programs

    kept = {}
    options = given.rows, given.formats, given.lists, given.entries, given.ranks
    for rows, format, lists, entries, ranks in itertools.product(*[option.split(",") for option in options]):
        padding, grid = min(given.padding, int(rows) - 1), max(given.grid, 8 * int(rows))
        for seed in range(given.seeds):
            name = f"{rows} rows, {padding} of padding, {format}, {lists} lists, {entries} entries, {ranks} ranks"
            name += f", seed {seed}"
            begun = time.monotonic()
            more = {"short": lists == "short", "entries": int(entries), "ranks": int(ranks)}
            made = programs(int(rows), padding, format, **more)
            for what, found in left_by(made, grid, seed).items():
                kept[f"{name}: {what}"] = found.contiguous().clone()
            print(f"{given.tree}: {name} ({time.monotonic() - begun:.1f} s)", flush=True)
    save_file(kept, given.into)
    return 0


def _compare(given: argparse.Namespace) -> int:
    options = [
        f"--{name}={getattr(given, name)}"
        for name in ("rows", "padding", "formats", "lists", "entries", "ranks", "grid")
    ]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for tree, seeds in ((given.old, 1), (given.new, given.seeds)):
            into = f"{folder}/{len(found)}.safetensors"
            command = [sys.executable, "-m", "tools.emulate", "run", str(tree.resolve()), into, *options]
            if subprocess.run([*command, f"--seeds={seeds}"], cwd=Path(__file__).parents[2]).returncode:
                return 2
            found.append(load_file(into))
    old, new = found
    differing = 0
    for name, tensor in new.items():
        case, seed, what = name.partition(", seed ")[0], *name.partition(", seed ")[2].split(": ", 1)
        first = old[f"{case}, seed 0: {what}"]
        if tensor.shape == first.shape and tensor.dtype == first.dtype:
            unequal = (tensor.view(torch.uint8) != first.view(torch.uint8)).sum().item() if tensor.numel() else 0
            if not unequal:
                continue
            what += f": {unequal} of {first.nbytes} bytes"
        differing += 1
        print(f"DIFFERS: {case}, seed {seed}: {what}")
    print(f"{len(new)} tensors, {differing} differ" if differing else f"{len(new)} tensors, equal in every bit")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
