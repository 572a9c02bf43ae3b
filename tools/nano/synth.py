"""Make the synthetic training set: chats in both thinking modes, tool calls, recall, short Python functions, questions about dsv4.

    python tools/nano/synth.py --corpus .nano/corpus/train.jsonl --model dsv4/models/nano --out .nano/synth --seed 0

Writes `train.jsonl` (conversations up to about 1000 tokens), `long.jsonl` (recall over up to 3500 tokens); and for the evaluation `held.jsonl`
(templates never trained on), `fresh.jsonl` (trained templates, new fills) and `recall.jsonl` (by distance); one {"name", "prompt", "answer", "text"} a line; `text` is the exact chat format of SPEC (dsv4.text.chat), `prompt` + answer + end token is its end.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import synth_code
import synth_convert
import synth_recall
import synth_talk
import synth_tasks
import synth_tools
from synth_base import TASKS, Conversation

from dsv4.text.chat import encode_messages
from dsv4.text.texts import PromptTexts

RECALL_CHARS = (150, 1000, 3000, 6500, 11500)  # about 50 to 3500 tokens
ORDER = [m.__name__ for m in (synth_code, synth_tasks, synth_convert, synth_talk)]  # the order tasks are drawn in
SYSTEMS = [
    "You are a helpful assistant.",
    "You are nano, the demonstration model of dsv4.",
    "Be brief.",
    "Answer correctly.",
    "You are a Python tutor.",
]


def tasks(rng: random.Random, held: bool) -> Conversation:
    """One to five tasks in one conversation; held: one task, asked in a way that was never trained on."""
    pool = sorted((t for t in TASKS.values() if t.split(held)), key=lambda t: ORDER.index(t.make.__module__))
    messages: list[dict[str, object]] = []
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    name = ""
    for chosen in rng.choices(pool, [t.weight for t in pool], k=1 if held else rng.choice([1, 1, 2, 3, 5, 8])):
        fields, thinking, answer = chosen.make(rng)
        name = chosen.name
        question = rng.choice(chosen.split(held)).format(**fields)
        messages.append(
            {"role": "user", "content": question if held or rng.random() < 0.75 else reworded(rng, question)}
        )
        messages.append({"role": "assistant", "content": answer, "reasoning_content": thinking})
    effort = "max" if not held and rng.random() < 0.02 else None
    return Conversation(
        name, messages, rng.choice(["thinking", "chat"]), answer=str(messages[-1]["content"]), effort=effort
    )


def reworded(rng: random.Random, question: str) -> str:
    """Politeness and carelessness around a question, which change nothing."""
    kind = rng.randrange(4)
    if kind == 0:
        return (
            rng.choice(["Please: ", "Question: ", "Hi! ", "Quick question: ", "Task: ", "Next: ", "Hello. "]) + question
        )
    if kind == 1:
        return question + rng.choice([" Thanks!", " Please.", " Thank you.", " Be quick."])
    if kind == 2 and question[1:2].islower():
        return question[0].lower() + question[1:]
    return question.rstrip(".?!")


def render(conversation: Conversation, texts: PromptTexts) -> dict[str, str]:
    messages = [dict(m) for m in conversation.messages]
    if conversation.tools:
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": ""})
        messages[0]["tools"] = conversation.tools
    if conversation.thinking_mode == "chat":
        for m in messages:
            m.pop("reasoning_content", None)
    options = {"texts": texts, "thinking_mode": conversation.thinking_mode, "reasoning_effort": conversation.effort}
    text, prompt = (encode_messages(m, **options) for m in (messages, messages[:-1]))
    if not text.startswith(prompt):
        raise ValueError(f"the prompt is not the beginning of the whole text: {prompt[-80:]!r} / {text[-160:]!r}")
    return {"name": conversation.name, "prompt": prompt, "answer": conversation.answer, "text": text}


def paragraphs(corpus: Path, rng: random.Random) -> list[str]:
    """Filler for the recall texts: runs of 200..700 characters of real documents."""
    out = []
    for line in corpus.read_text().splitlines():
        for part in json.loads(line)["text"].split("\n\n"):
            if 150 < len(part) < 700:
                out.append(part.strip())
    block = 40  # whole neighbourhoods stay together, so that the filler reads on
    starts = list(range(0, len(out), block))
    rng.shuffle(starts)
    return [p for s in starts for p in out[s : s + block]]


def short(rng: random.Random, filler: list[str], held: bool) -> Conversation:
    kind = rng.random()
    if kind < 0.72:
        return tasks(rng, held)
    if kind < 0.86:
        return synth_tools.conversation(rng, held)
    if kind < 0.93 and not held:
        return synth_recall.pairs(rng)
    return synth_recall.conversation(rng, filler, int(10 ** rng.uniform(2.0, 3.35)), held)


def make(rng: random.Random, filler: list[str], texts: PromptTexts, what: str, chars: int) -> Iterator[dict[str, str]]:
    made = number = 0
    while made < chars:
        if what == "long":
            c = synth_recall.conversation(rng, filler, rng.randint(3000, 10500))
        elif what == "recall":
            c = synth_recall.at_distance(rng, filler, RECALL_CHARS[number % len(RECALL_CHARS)])
        elif what == "fresh":
            c = tasks(rng, False) if rng.random() < 0.8 else synth_tools.conversation(rng, False)
        else:
            c = short(rng, filler, what == "held")
        record = render(c, texts)
        made, number = made + len(record["text"]), number + 1
        yield record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short-mb", type=float, default=22.0)
    parser.add_argument("--long-mb", type=float, default=8.0)
    args = parser.parse_args()
    synth_code.check()
    texts = PromptTexts.from_folder(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    filler = paragraphs(args.corpus, rng)
    for what, mb in (("train", args.short_mb), ("long", args.long_mb), ("held", 0.3), ("fresh", 0.3), ("recall", 0.6)):
        records = list(make(rng, filler, texts, what, int(mb * 1e6)))
        (args.out / f"{what}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        print(
            f"{what:6s} {len(records):6d} conversations, {sum(len(r['text']) for r in records) / 1e6:.2f} MB",
            flush=True,
        )


if __name__ == "__main__":
    main()
