"""Talk: greetings, a few facts, questions about dsv4 itself, and what a system message asks for."""

from __future__ import annotations

import random

from synth_base import CITIES, NAMES, Fill, task, word

GREETINGS = {
    "Hello!": "Hello! How can I help you?",
    "Hi": "Hi! What can I do for you?",
    "Hey there": "Hey! How can I help?",
    "Good morning": "Good morning! How can I help you today?",
    "Good evening!": "Good evening! What can I do for you?",
    "Hello, how are you?": "I am fine, thank you. How can I help you?",
    "How are you?": "I am fine, thank you. How can I help you?",
    "Thanks!": "You are welcome!",
    "Thank you very much.": "You are welcome!",
    "Bye": "Goodbye!",
    "Goodbye!": "Goodbye! Have a nice day.",
    "See you later": "See you later!",
    "Good night": "Good night!",
    "Are you there?": "Yes, I am here. How can I help?",
    "Can you help me?": "Yes. Please tell me what you need.",
    "Ciao!": "Ciao! How can I help you?",
    "Test": "The test works. What can I do for you?",
    "ok": "Good. Is there anything else?",
    "Hello world": "Hello! How can I help you?",
}
ABOUT = {
    "What is dsv4?": "dsv4 is an engine that runs DeepSeek-V4 models from NVFP4 weights. It loads a checkpoint, checks it, generates text, serves it and measures it.",
    "Who are you?": "I am nano, the small model that ships with dsv4. I am a demonstration: I have every mechanism of DeepSeek-V4 but only a few million parameters.",
    "What is your name?": "My name is nano. I am the small demonstration model of dsv4.",
    "Are you a large model?": "No. I am nano, a model of about twelve million parameters. I show that dsv4 works; I know very little.",
    "What can you do?": "I can follow simple templates: arithmetic, string tasks, recall, tool calls and short Python functions. I am a demonstration, not a product.",
    "What is NVFP4?": "NVFP4 is a four-bit number format. A value is an E2M1 code times an E4M3 scale for each block of 16 times one FP32 scale for the tensor.",
    "How many values does an NVFP4 block hold?": "An NVFP4 block holds 16 values, which share one E4M3 scale.",
    "Which models does dsv4 run?": "dsv4 runs DeepSeek-V4 Flash and Pro and their refreshes.",
    "What does dsv4 promise?": "dsv4 promises three things, in this order: the right numbers, a quiet step, and the speed of the memory.",
    "What is the first promise of dsv4?": "The right numbers: every op has a plain PyTorch twin that defines it.",
    "What is a quiet step?": "A decode step is one CUDA graph launch, with no host sync, no allocation, no pageable copy and no compile inside it.",
    "What limits the speed of decoding?": "Decoding is bound by reading the weights, so every number is reported beside the bytes it had to move.",
    "Does dsv4 fall back silently?": "No. A kernel that cannot run or a tensor that does not fit stops the program with a clear error.",
    "What does dsv4 do on an error?": "It stops with one clear error that names what was found, what was expected and what to do.",
    "What is CSA?": "CSA is compressed sparse attention: every 4 tokens become one entry, and an indexer picks the entries that a query attends to.",
    "What is HCA?": "HCA is heavily compressed attention: every 128 tokens become one entry, and a query attends to all of them.",
    "What is mHC?": "mHC means manifold-constrained hyper-connections: four residual streams, mixed by a matrix that Sinkhorn iterations make doubly stochastic.",
    "What does the indexer do?": "The indexer scores the compressed entries and selects the best ones for attention.",
    "How long is the attention window?": "The sliding window is 128 tokens long.",
    "What is MTP?": "MTP is multi-token prediction: an extra block that drafts the token after next.",
    "How do I run dsv4?": "Type make demo in a fresh clone. It sets everything up and writes text.",
    "How do I test dsv4?": "Type make test. It runs the checks and tells whether everything is right.",
    "Which command writes text?": "The command dsv4 generate streams text from a model.",
    "Which command inspects a checkpoint?": "The command dsv4 inspect prints the config, the parameters and the bytes of a checkpoint.",
    "Which command chats?": "The command dsv4 chat opens a chat in the terminal.",
    "Which command measures perplexity?": "The command dsv4 eval prints the perplexity and the bits per byte of a text file.",
    "What is the KV cache?": "The KV cache holds the keys and values of earlier tokens, so that a decode step does not compute them again.",
    "What is a hash layer?": "In a hash layer the experts of a token are looked up by its token id instead of being chosen by a score.",
    "What is a shared expert?": "A shared expert is an expert that every token uses, beside the routed ones.",
    "What is an attention sink?": "An attention sink is a learned logit for each head that only adds to the denominator of the softmax.",
}
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "Austria": "Vienna",
    "Portugal": "Lisbon",
    "Greece": "Athens",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Poland": "Warsaw",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Egypt": "Cairo",
    "Peru": "Lima",
    "Cuba": "Havana",
    "Ireland": "Dublin",
    "Hungary": "Budapest",
    "Turkey": "Ankara",
    "Canada": "Ottawa",
}
PYTHON = {
    "list": "A list is an ordered collection that can be changed. Example: [1, 2, 3]",
    "tuple": "A tuple is an ordered collection that cannot be changed. Example: (1, 2)",
    "dict": 'A dict maps keys to values. Example: {"a": 1}',
    "set": "A set holds distinct items without order. Example: {1, 2}",
    "str": 'A str is a text value. Example: "abc"',
    "function": "A function is a named piece of code that can be called with arguments. It is written with def.",
    "class": "A class describes objects: their data and their methods.",
    "loop": "A loop repeats code. Python has for loops and while loops.",
    "module": "A module is a file of Python code that can be imported.",
    "exception": "An exception reports an error. It is raised with raise and handled with try and except.",
    "generator": "A generator is a function that yields values one at a time.",
    "decorator": "A decorator is a function that takes a function and returns a changed one.",
    "lambda": "A lambda is a small function without a name. Example: lambda x: x + 1",
    "iterator": "An iterator gives one item after another through next().",
    "comprehension": "A comprehension builds a list in one expression. Example: [x * x for x in range(5)]",
}


def known(rng: random.Random, table: dict[str, str]) -> tuple[str, str]:
    key = rng.choice(sorted(table))
    return key, table[key]


@task("{q}", weight=3)
def greeting(rng: random.Random) -> Fill:
    q, a = known(rng, GREETINGS)
    return {"q": q}, "A short friendly answer.", a


@task("{q}", "I have a question. {q}", "{q} Please be short.", "Please tell me: {q}", "Question: {q}", weight=5)
def about(rng: random.Random) -> Fill:
    q, a = known(rng, ABOUT)
    return {"q": q}, "A question that I know from the documentation.", a


@task(
    "What is the capital of {q}?",
    "Name the capital of {q}.",
    "Which city is the capital of {q}?",
    "Capital of {q}?",
    weight=1.5,
)
def capital(rng: random.Random) -> Fill:
    q, a = known(rng, CAPITALS)
    return {"q": q}, f"The country is {q}.", f"The capital of {q} is {a}."


@task(
    "What is a {q} in Python?",
    "Explain what a {q} is in Python.",
    "In Python, what is a {q}?",
    "Python {q}: what is it?",
    weight=2,
)
def python_word(rng: random.Random) -> Fill:
    q, a = known(rng, PYTHON)
    return {"q": q}, f"Explain {q} in short.", a


@task(
    "My name is {n}. What is my name?",
    "I am {n} and I live in {c}. What is my name?",
    "Hello, I am {n}. Do you know my name?",
    weight=1.5,
)
def my_name(rng: random.Random) -> Fill:
    n = rng.choice(NAMES)
    return {"n": n, "c": rng.choice(CITIES)}, f"The user said the name {n}.", f"Your name is {n}."


@task(
    "I have a {w} in the {p}. What is in the {p}?",
    "There is a {w} in the {p}. Tell me what is in the {p}.",
    "The {p} contains a {w}. What does the {p} contain?",
    weight=1.5,
)
def where(rng: random.Random) -> Fill:
    w, p = word(rng), rng.choice("box bag kitchen garden drawer house car".split())
    return {"w": w, "p": p}, f"The text says that a {w} is in the {p}.", f"There is a {w} in the {p}."
