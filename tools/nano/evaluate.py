"""Measure a trained master: held-out loss under every quantisation, templates, recall by distance, expert use,
indexer, MTP; and samples.

python tools/nano/evaluate.py --nano .nano --model dsv4/models/nano --master RUN --out RUN/eval.json [--limit 256]
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path

import torch
from data import BOS, EOS
from fakequant import Quant
from generate import generate
from model import Nano, losses
from moe import Gate
from shape import CONFIG
from store import load_master
from tokenizers import Tokenizer

MODES = {
    "unquantised": Quant(),
    "W4A16 (native, bf16 activations)": Quant("native", "bf16", True, True),
    "native, fp8 activations": Quant("native", "fp8", True, True),
    "W4A4 (native, nvfp4 activations)": Quant("native", "nvfp4", True, True),
    "all-linear NVFP4, bf16 activations": Quant("nvfp4", "bf16", True, True),
    "all-linear NVFP4, nvfp4 activations": Quant("nvfp4", "nvfp4", True, True),
}
NATIVE = MODES["W4A16 (native, bf16 activations)"]
PROMPTS = [
    "def read(self, path):\n",
    "import os\nimport sys\n\ndef main(argv):\n",
    'class Stack:\n    """A simple stack."""\n\n    def __init__(self):\n',
    "# Ownership\n\nIn Rust, every value has",
    "The `path` module provides",
    "Returns the number of",
]
CHATS = [
    "Hello!",
    "What is dsv4?",
    "What is NVFP4?",
    "What is 47 + 85?",
    "Write a Python function that computes the factorial of a number.",
    "Reverse the word garden.",
    "Sort these numbers: 42, 7, 19, 88",
    "Who are you?",
    "My name is Nora. What is my name?",
]


def rows(documents: list[list[int]], t: int) -> torch.Tensor:
    """Documents cut to rows of t + 2 tokens; short ends are joined."""
    flat = torch.tensor([x for d in documents for x in d])
    return flat[: len(flat) // (t + 2) * (t + 2)].view(-1, t + 2)


@torch.no_grad()
def loss_of(model: Nano, data: torch.Tensor, quant: Quant, dtype: torch.dtype, select: bool = True) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    step = max(1, 32768 // data.shape[1])
    for part in data.split(step):
        ids = part.to(next(model.parameters()).device)
        terms = losses(model, ids, torch.ones_like(ids, dtype=torch.float32), quant, select, dtype)
        for k, v in terms._asdict().items():
            total[k] += float(v) * len(part) / len(data)
    return {k: round(v, 4) for k, v in total.items()}


@torch.no_grad()
def routing(model: Nano, data: torch.Tensor, dtype: torch.dtype) -> dict[str, list[float]]:
    model(data[:32].to(next(model.parameters()).device), NATIVE, dtype=dtype)
    return {n: [round(v, 4) for v in m.load.tolist()] for n, m in model.named_modules() if isinstance(m, Gate)}


@torch.no_grad()
def acceptance(model: Nano, data: torch.Tensor, dtype: torch.dtype) -> float:
    """How often the MTP block's first choice for token t+2 is the trunk's own (greedy, on held-out text)."""
    ids = data[:32].to(next(model.parameters()).device)
    h, _ = model.streams(ids[:, :-2], NATIVE, True, dtype)
    drafted, _ = model.draft(h, ids[:, :-1], NATIVE)
    own = model.logits(model.norm(model.hc_head(h)), NATIVE).argmax(-1)
    return round((drafted.argmax(-1)[:, :-1] == own[:, 1:]).float().mean().item(), 4)


def templates(
    model: Nano, tokenizer: Tokenizer, records: list[dict[str, str]], dtype: torch.dtype, new_tokens: int
) -> tuple[dict[str, float], list[str]]:
    """Share of exact answers by task; a wrong one is shown."""
    prompts = [tokenizer.encode(r["prompt"], add_special_tokens=False).ids for r in records]
    made = generate(model, prompts, new_tokens, NATIVE, dtype)
    hits, wrong = defaultdict(list), []
    for record, ids in zip(records, made, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=False).split("</think>")[-1]
        hits[record["name"]].append(text == record["answer"])
        hits["all"].append(text == record["answer"])
        if text != record["answer"]:
            asked, expected = record["prompt"][-120:], record["answer"][-100:]
            wrong.append(f"{record['name']}: {asked!r} -> {text[-100:]!r}, expected {expected!r}")
    return {k: round(sum(v) / len(v), 3) for k, v in sorted(hits.items())}, wrong[:25]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nano", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--master", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=int, default=256)
    parser.add_argument("--losses-only", action="store_true", help="no generation")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    torch.set_float32_matmul_precision("high")
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    model = (
        Nano(CONFIG).to(args.device).train()
    )  # training mode: the gates report their load and the indexers their loss
    state = load_master(args.master, model)

    def lines(name: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in (args.nano / name).read_text().splitlines()][
            : None if "held.jsonl" in name and "corpus" in name else args.limit
        ]

    documents: dict[str, list[list[int]]] = defaultdict(list)
    size: dict[str, int] = defaultdict(int)
    for r in lines("corpus/held.jsonl"):
        ids = [BOS, *tokenizer.encode(r["text"], add_special_tokens=False).ids, EOS]
        for source in (r["source"], "all"):
            documents[source].append(ids)
            size[source] += len(r["text"].encode())
    held = rows(documents["all"], 1024)
    held = held[:: max(1, len(held) // args.limit)][: args.limit]  # spread over the sources
    result: dict[str, object] = {"state": state, "held_out_rows": len(held)}
    per_token = sum(map(len, documents["all"])) / size["all"] / math.log(2)
    result["losses"] = {
        k: (m := loss_of(model, held, q, dtype)) | {"bits_per_byte": round(m["lm"] * per_token, 4)}
        for k, q in MODES.items()
    }
    result["dense_attention"] = loss_of(model, held, NATIVE, dtype, select=False)
    result["held_4096"] = loss_of(model, rows(documents["all"], 4096)[: args.limit], NATIVE, dtype)
    result["dense_attention_4096"] = loss_of(
        model, rows(documents["all"], 4096)[: args.limit], NATIVE, dtype, select=False
    )
    result["by_source"] = {
        s: loss_of(model, rows(d, 1024)[: args.limit], NATIVE, dtype)["lm"]
        for s, d in documents.items()
        if sum(map(len, d)) > 3000
    }
    result["experts"] = routing(model, held[:, :1024], dtype)
    result["mtp_agreement"] = acceptance(model, held, dtype)
    print(json.dumps(result, indent=1), flush=True)
    for name, new in () if args.losses_only else (("held", 128), ("fresh", 128), ("recall", 24)):
        hits, wrong = templates(model, tokenizer, lines(f"synth/{name}.jsonl"), dtype, new)
        result[f"templates_{name}"], result[f"wrong_{name}"] = hits, wrong
        print(name, json.dumps(hits), *wrong[:6], sep="\n", flush=True)
    if args.losses_only:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        return
    prompts = [[BOS, *tokenizer.encode(p, add_special_tokens=False).ids] for p in PROMPTS]
    prompts += [
        tokenizer.encode(f"<｜begin▁of▁sentence｜><｜User｜>{c}<｜Assistant｜>{t}", add_special_tokens=False).ids
        for c in CHATS
        for t in ("</think>", "<think>")
    ]
    texts = generate(model, prompts, 120, NATIVE, dtype, temperature=0.5)
    result["samples"] = [
        tokenizer.decode(p + t, skip_special_tokens=False) for p, t in zip(prompts, texts, strict=True)
    ]
    print(*result["samples"], sep="\n-----\n")
    args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
