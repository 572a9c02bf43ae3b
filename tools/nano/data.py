"""Token files and batches. A file is uint16 tokens with document starts at BOS; a batch row is text, or whole
conversations, or long recall.

python tools/nano/data.py --nano .nano --model dsv4/models/nano      (tokenise:
.nano/tokens/{text,short,long,held_text,held_chat}.npy)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

FILES = {
    "text": "corpus/train.jsonl",
    "short": "synth/train.jsonl",
    "long": "synth/long.jsonl",
    "held_text": "corpus/held.jsonl",
    "held_chat": "synth/held.jsonl",
}
BOS, EOS, USER, ASSISTANT = 0, 1, 4, 5
ANSWER_WEIGHT = 3.0  # tokens of the assistant's turns count more: they are few, and they are what is asked for


def tokenise(nano: Path, model: Path) -> None:
    from tokenizers import Tokenizer  # only here: training needs numpy alone

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = [
        tokenizer.token_to_id(t)
        for t in ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
    ]
    if ids != [BOS, EOS, USER, ASSISTANT]:
        raise SystemExit(f"the tokenizer's special ids are {ids}, expected {[BOS, EOS, USER, ASSISTANT]}")
    (nano / "tokens").mkdir(exist_ok=True)
    for name, path in FILES.items():
        texts = [json.loads(line)["text"] for line in (nano / path).read_text().splitlines()]
        chats = path.startswith("synth")  # a conversation brings its own BOS and EOS
        out = []
        for i in range(0, len(texts), 2000):
            for e in tokenizer.encode_batch(texts[i : i + 2000], add_special_tokens=False):
                out.append(np.array(e.ids if chats else [BOS, *e.ids, EOS], dtype=np.uint16))
        tokens = np.concatenate(out)
        np.save(nano / "tokens" / f"{name}.npy", tokens)
        density = sum(map(len, texts)) / len(tokens)
        print(f"{name:9s} {len(out):6d} documents {len(tokens) / 1e6:7.3f} M tokens, {density:.2f} characters each")


class Batches:
    """Rows of T + 2 tokens: a share of running text (every chunk once an epoch, at a shifting offset), the rest whole
    conversations."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.tokens = {n: np.load(folder / f"{n}.npy") for n in ("text", "short", "long")}
        self.starts = {n: np.flatnonzero(self.tokens[n] == BOS) for n in ("short", "long")}
        self.queue: dict[tuple[str, int], np.ndarray] = {}
        self.read = dict.fromkeys(self.tokens, 0)

    def _next(self, name: str, kind: int, fresh: np.ndarray) -> int:
        """The next element of a shuffled pass over `fresh`."""
        left = self.queue.get((name, kind), fresh[:0])
        if not len(left):
            left = self.rng.permutation(fresh)
        self.queue[name, kind] = left[1:]
        return int(left[0])

    def text_row(self, n: int) -> np.ndarray:
        chunks = (len(self.tokens["text"]) - 2 * n) // n
        start = self._next("text", n, np.arange(chunks)) * n + int(self.rng.integers(n))
        return self.tokens["text"][start : start + n]

    def chat_row(self, name: str, n: int) -> np.ndarray:
        """Whole conversations from their start; the last one is cut at the row's end."""
        starts, tokens, parts, size = self.starts[name], self.tokens[name], [], 0
        while size < n:
            i = self._next(name, 0, np.arange(len(starts)))
            end = starts[i + 1] if i + 1 < len(starts) else len(tokens)
            parts.append(tokens[starts[i] : end])
            size += len(parts[-1])
            name = "short" if name == "long" else name  # one long conversation a row, filled up with short ones
            starts, tokens = self.starts[name], self.tokens[name]
        return np.concatenate(parts)[:n]

    def batch(self, rows: int, t: int, text_share: float) -> tuple[np.ndarray, np.ndarray]:
        """ids [rows, t + 2] int64 and weights float32."""
        texts = round(rows * text_share)
        out = [self.text_row(t + 2) for _ in range(texts)]
        out += [self.chat_row("long" if t > 2048 and i % 2 == 0 else "short", t + 2) for i in range(rows - texts)]
        ids = np.stack(out).astype(np.int64)
        return ids, answer_weights(ids)


def answer_weights(ids: np.ndarray) -> np.ndarray:
    """1, and ANSWER_WEIGHT for the tokens from after <|Assistant|> up to and including the end of sentence."""
    place = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    opened = np.maximum.accumulate(np.where(ids == ASSISTANT, place, -1), 1)
    closed = np.maximum.accumulate(np.where((ids == EOS) | (ids == BOS) | (ids == USER), place, -1), 1)
    closed = np.concatenate([np.full((len(ids), 1), -1), closed[:, :-1]], 1)
    return np.where((opened > closed) & (ids != ASSISTANT), ANSWER_WEIGHT, 1.0).astype(np.float32)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nano", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    args = parser.parse_args()
    tokenise(args.nano, args.model)
