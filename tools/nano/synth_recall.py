"""Key -> value recall over 50 to 3500 tokens: facts in running text (real documents as filler), asked for later.

This is what makes the compressed layers and the indexer work: beyond the window of 128 tokens a value can only come from them.
"""

from __future__ import annotations

import random

from synth_base import CITIES, NAMES, Conversation, word, words

KINDS = [
    # fact, question, thinking, answer
    (
        "The code of {k} is {v}.",
        "What is the code of {k}?",
        "The text says: The code of {k} is {v}.",
        "The code of {k} is {v}.",
    ),
    ("Remember: {k} = {v}", "What is {k}?", "The text says: {k} = {v}.", "{k} = {v}"),
    (
        "The password for {k} is {v}.",
        "What is the password for {k}?",
        "The text says: The password for {k} is {v}.",
        "The password for {k} is {v}.",
    ),
    (
        "Note: {k} lives in room {v}.",
        "In which room does {k} live?",
        "The text says: {k} lives in room {v}.",
        "{k} lives in room {v}.",
    ),
    (
        "The key {k} opens door {v}.",
        "Which door does the key {k} open?",
        "The text says: The key {k} opens door {v}.",
        "The key {k} opens door {v}.",
    ),
]
ATTRIBUTES = "color size price weight name height address id value score rank total level age owner status version port day month speed length label team".split()
KINDS += [
    (
        f"The {a} of {{k}} is {{v}}.",
        f"What is the {a} of {{k}}?",
        f"The text says: The {a} of {{k}} is {{v}}.",
        f"The {a} of {{k}} is {{v}}.",
    )
    for a in ATTRIBUTES
]
KINDS += [
    ("{k} was born in {v}.", "Where was {k} born?", "The text says: {k} was born in {v}.", "{k} was born in {v}."),
    ("{k} likes {v}.", "What does {k} like?", "The text says: {k} likes {v}.", "{k} likes {v}."),
    ("{k} -> {v}", "{k}?", "The text says: {k} -> {v}.", "{v}"),
    ("Set {k} to {v}.", "To what is {k} set?", "The text says: Set {k} to {v}.", "{k} is set to {v}."),
    ("{k} has {v} points.", "How many points has {k}?", "The text says: {k} has {v} points.", "{k} has {v} points."),
    (
        "Put the {v} into the {k}.",
        "What goes into the {k}?",
        "The text says: Put the {v} into the {k}.",
        "The {v} goes into the {k}.",
    ),
]
HELD_KIND = (
    "The number of {k} is {v}.",
    "What is the number of {k}?",
    "The text says: The number of {k} is {v}.",
    "The number of {k} is {v}.",
)


def value(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.6:
        return str(rng.randint(10 ** (n := rng.randint(1, 3)), 10 ** (n + 1) - 1))
    return word(rng) if kind < 0.9 else rng.choice(CITIES)


def keys(rng: random.Random, n: int) -> list[str]:
    pool = words(rng, n)
    return [rng.choice(NAMES) if rng.random() < 0.1 and i == 0 else w for i, w in enumerate(pool)]


def conversation(rng: random.Random, filler: list[str], chars: int, held: bool = False) -> Conversation:
    """A text of about `chars` characters with facts spread over it, then questions about some of them in any order."""
    kind = HELD_KIND if held else rng.choice(KINDS)
    n = rng.randint(1, 4 + chars // 800)
    facts = [(k, value(rng)) for k in keys(rng, n)]
    start = rng.randrange(len(filler))
    parts, size = [], 0
    while size < chars:
        parts.append(filler[start % len(filler)])
        size += len(parts[-1])
        start += 1
    spots = sorted(rng.randrange(len(parts) + 1) for _ in facts)
    for spot, (k, v) in reversed(list(zip(spots, facts, strict=True))):
        parts.insert(spot, kind[0].format(k=k, v=v))
    opening = rng.choice(["Read this text and remember the facts.\n\n", "Here are some notes.\n\n", ""])
    mode = rng.choice(["thinking", "chat", "chat"])
    asked = rng.sample(facts, min(len(facts), rng.randint(1, 5)))
    messages: list[dict[str, object]] = []
    for i, (k, v) in enumerate(asked):
        text = kind[1].format(k=k)
        if i == 0:
            text = opening + "\n\n".join(parts) + "\n\n" + text
        messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": kind[3].format(k=k, v=v), "reasoning_content": kind[2].format(k=k, v=v)},
        ]
    return Conversation("recall_held" if held else "recall", messages, mode, answer=str(messages[-1]["content"]))


def pairs(rng: random.Random) -> Conversation:
    """A dense list of pairs and questions about it: short distances, many answers in one text."""
    facts = [(k, value(rng)) for k in words(rng, rng.randint(3, 24))]
    sep = rng.choice([": ", " = ", " -> "])
    lines = "\n".join(k + sep + v for k, v in facts)
    messages: list[dict[str, object]] = []
    for i, (k, v) in enumerate(rng.choices(facts, k=rng.randint(2, 8))):
        text = rng.choice(["What is the value of {k}?", "{k}?", "Look up {k}."]).format(k=k)
        messages += [
            {"role": "user", "content": f"Here is a table.\n{lines}\n\n{text}" if i == 0 else text},
            {"role": "assistant", "content": v, "reasoning_content": f"The table says: {k}{sep}{v}."},
        ]
    return Conversation("pairs", messages, rng.choice(["thinking", "chat"]), answer=str(messages[-1]["content"]))


def at_distance(rng: random.Random, filler: list[str], chars: int) -> Conversation:
    """The asked-for fact right at the beginning, other facts of the same kind behind it, and the question `chars` later: the recall test."""
    kind = rng.choice(KINDS)
    facts = [(k, value(rng)) for k in words(rng, 4)]
    start, parts = rng.randrange(len(filler)), []
    while sum(map(len, parts)) < chars:
        parts.append(filler[(start + len(parts)) % len(filler)])
    for k, v in facts[1:]:
        parts.insert(rng.randrange(1, len(parts) + 1), kind[0].format(k=k, v=v))
    k, v = facts[0]
    text = "\n\n".join(["Here are some notes.", kind[0].format(k=k, v=v), *parts, kind[1].format(k=k)])
    answer = {"role": "assistant", "content": kind[3].format(k=k, v=v), "reasoning_content": kind[2].format(k=k, v=v)}
    return Conversation(
        f"recall_{chars}", [{"role": "user", "content": text}, answer], "chat", answer=str(answer["content"])
    )
