"""Clean the permissive text on this machine into two JSONL files: `train.jsonl` and `held.jsonl` (whole files, 2 %).

    python tools/nano/corpus.py --out .nano/corpus [--root cpython=/path ...]

Each line is {"source", "name", "sha256" of the raw text, "text"}. Removed: licence headers, Copyright/Author lines,
e-mail addresses,
lines over 400 characters, tables of numbers, text that is not mostly ASCII, repeated documents, and paragraphs
repeated within a source.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

from sources import default_roots, read

KEEP = {
    "numpy": 0.7,
    "scipy": 0.5,
    "sympy": 0.7,
    "networkx": 1.0,
    "cmake": 0.5,
}  # down-weighted sources: share of files kept
EMAIL = re.compile(r"<?\b[\w.+-]+@[\w-]+(\.[\w-]+)+\b>?")
LEGAL = re.compile(
    r"copyright|\(c\) \d{4}|all rights reserved|licen[cs]ed? (to|under)"
    r"|^\W*(__)?(author|maintainer|contact|credits)s?(__)?\W*[:=]",
    re.I,
)


def fraction(key: str) -> float:
    """A number in [0, 1) that depends on the text alone: choices by it survive reordering and other machines."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def clean(text: str) -> str:
    text = re.sub(r"<!--.*?-->\n?", "", text.replace("\r", "").replace("\t", "    "), flags=re.S)
    text = drop_licence_header(text)
    lines = []
    for line in text.split("\n"):
        if len(line) > 400 or LEGAL.search(line) or "-*- coding" in line or line.startswith("#!"):
            continue
        lines.append(EMAIL.sub("", line).rstrip())
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip() + "\n"


def drop_licence_header(text: str) -> str:
    """The leading comment block of a Python file goes when it speaks of copyright or licence."""
    head = re.match(r"(?:#.*\n|\s*\n)+", text)
    if head and re.search(r"copyright|licen[cs]e|permission", head.group(0), re.I):
        return text[head.end() :]
    return text


def usable(text: str) -> bool:
    if len(text) < 120 or sum(map(str.isdigit, text)) > 0.2 * len(text):
        return False
    return sum(ord(c) > 127 for c in text) < 0.02 * len(text)


def without_repeats(docs: list[dict[str, str]]) -> list[dict[str, str]]:
    """Drop documents with the same opening, and from the rest any long paragraph already seen twice in the same
    source."""
    openings: set[str] = set()
    paragraphs: Counter[str] = Counter()
    kept = []
    for doc in docs:
        opening = re.sub(r"\W+", " ", doc["text"].lower())[:300]
        if opening in openings:
            continue
        openings.add(opening)
        parts = []
        for part in doc["text"].split("\n\n"):
            key = re.sub(r"\W+", " ", part.lower())
            paragraphs[key] += len(key) > 120
            if paragraphs[key] <= 2:
                parts.append(part)
        doc["text"] = "\n\n".join(parts)
        kept.append(doc)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--root", action="append", default=[], metavar="SOURCE=FOLDER")
    args = parser.parse_args()
    roots = default_roots() | {s: Path(p) for s, p in (r.split("=", 1) for r in args.root)}
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "train.jsonl").open("w") as train, (args.out / "held.jsonl").open("w") as held:
        for source, root in roots.items():
            docs = []
            for name, raw in read(source, root):
                text = clean(raw)
                if usable(text) and fraction(f"keep/{source}/{name}") < KEEP.get(source, 1.0):
                    docs.append(
                        {
                            "source": source,
                            "name": name,
                            "sha256": hashlib.sha256(raw.encode()).hexdigest(),
                            "text": text,
                        }
                    )
            docs = without_repeats(docs)
            sizes = [0, 0]
            for doc in docs:
                out = fraction(f"held/{source}/{doc['name']}") < 0.02
                sizes[out] += len(doc["text"])
                (held if out else train).write(json.dumps(doc) + "\n")
            sizes_text = f"{sizes[0] / 1e6:6.2f} MB to train on, {sizes[1] / 1e3:.1f} kB held out"
            print(f"{source:9s} {len(docs):5d} documents, {sizes_text}", flush=True)


if __name__ == "__main__":
    main()
