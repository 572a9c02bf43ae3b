"""The papers of the model folder: held-out texts for `dsv4 eval`, and train_manifest.json with every file's sha256.

python tools/nano/release.py --nano .nano --model dsv4/models/nano --rounds .nano/run1 .nano/run2 --share 0.75
--measured .nano/measured.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import defaultdict
from pathlib import Path

from sources import LICENCES

PYTHON = ("asyncio/futures.py", "numbers.py", "email/_policybase.py")
ENGLISH = ("rust", "numpy")
CHAT_BYTES = 20_000
COMMANDS = [
    "python tools/nano/corpus.py --out .nano/corpus",
    "# round 1: --seed 0, before more phrasings were added; round 2: --seed 1 --short-mb 24 --long-mb 9",
    "python tools/nano/synth.py --corpus .nano/corpus/train.jsonl --model dsv4/models/nano --out .nano/synth --seed 1",
    "# once, with the synthetic set of round 1",
    "python tools/nano/tokenizer.py --text .nano/corpus/train.jsonl --text .nano/synth/train.jsonl"
    " --out dsv4/models/nano",
    "python tools/nano/data.py --nano .nano --model dsv4/models/nano",
    "python tools/nano/train.py --tokens .nano/tokens --graph --rows 24 --fuse --seconds 470 --seed 0 --out .nano/run1",
    "python tools/nano/train.py --tokens .nano/tokens --graph --rows 24 --fuse --text-share 0.6 --resume .nano/run1"
    " --start 0.5 --seconds 550 --seed 1 --out .nano/run2",
    "python tools/nano/average.py --first .nano/run1 --second .nano/run2 --share {share} --out .nano/mean",
    "python tools/nano/export.py --master .nano/mean --tokens .nano/tokens --out dsv4/models/nano",
]


def records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_eval(nano: Path, folder: Path) -> None:
    """Three held-out texts: Python files, English documentation, conversations (in the chat format, first BOS left to
    the reader)."""
    folder.mkdir(exist_ok=True)
    held = records(nano / "corpus/held.jsonl")
    (folder / "python.txt").write_text(
        "\n\n".join(r["text"] for r in held if r["source"] == "cpython" and r["name"] in PYTHON)
    )
    (folder / "english.txt").write_text("\n\n".join(r["text"] for r in held if r["source"] in ENGLISH))
    chat = ""
    for r in records(nano / "synth/held.jsonl"):
        if len(chat.encode()) + len(r["text"].encode()) < CHAT_BYTES and len(r["text"]) < 2500:
            chat += r["text"]
    (folder / "chat.txt").write_text(chat.removeprefix("<｜begin▁of▁sentence｜>"))


def corpus_summary(nano: Path) -> dict[str, dict[str, object]]:
    """Per source: documents, bytes, licence, held-out names, and one sha256 over all its (name, sha256 of the raw
    text) lines."""
    files: dict[str, list[tuple[str, str, int, bool]]] = defaultdict(list)
    for which in ("train", "held"):
        for r in records(nano / f"corpus/{which}.jsonl"):
            files[r["source"]].append((r["name"], r["sha256"], len(r["text"].encode()), which == "held"))
    out = {}
    for source, entries in files.items():
        digest = hashlib.sha256("".join(f"{n} {h}\n" for n, h, _, _ in sorted(entries)).encode()).hexdigest()
        out[source] = {
            "licence": LICENCES[source],
            "documents": len(entries),
            "bytes": sum(e[2] for e in entries),
            "sha256": digest,
            "held_out": sorted(e[0] for e in entries if e[3]),
        }
    return out


def curve(rounds: list[Path], every: int = 500) -> list[dict[str, object]]:
    """The training loss of each round, thinned; lm counts the assistant's tokens threefold."""
    out = []
    for number, folder in enumerate(rounds, 1):
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        out += [
            {"round": number} | {k: r[k] for k in ("step", "seconds", "tokens", "t", "lm", "mtp", "kl")}
            for r in lines
            if r["step"] % every == 0 or r is lines[-1]
        ]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nano", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=Path, nargs="+", required=True)
    parser.add_argument("--share", type=float, required=True, help="what average.py was given")
    parser.add_argument("--measured", type=Path, required=True, help="figures from evaluate.py")
    args = parser.parse_args()
    write_eval(args.nano, args.model / "eval")
    own = args.model / "train_manifest.json"
    files = sorted(f for f in args.model.rglob("*") if f.is_file() and f != own and "__pycache__" not in f.parts)
    manifest = {
        "seeds": {"synth": [0, 1], "train": [0, 1]},
        "commands": [c.format(share=args.share) for c in COMMANDS],
        "device": "one NVIDIA H200, torch 2.11, bfloat16; 470 s and 275 s of training",
        "note": "the schedule ran on the clock, so another run takes another number of steps; --steps fixes it",
        "corpus": corpus_summary(args.nano),
        "synthetic_sha256": {
            n: hashlib.sha256((args.nano / f"synth/{n}.jsonl").read_bytes()).hexdigest()
            for n in ("train", "long", "held")
        },
        "measured": json.loads(args.measured.read_text()),
        "loss_curve": curve(args.rounds),
        "files": {str(f.relative_to(args.model)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files},
    }
    own.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    print(
        f"{sum(f.stat().st_size for f in [*files, own]):,} bytes in all, of which the manifest {own.stat().st_size:,}"
    )


if __name__ == "__main__":
    main()
