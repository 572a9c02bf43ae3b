"""Conversations with tool calls: one tool, two tools in a row or at once, results, and questions that need no tool."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from corpus import fraction
from synth_base import CITIES, NAMES, Conversation, word, words

Args = dict[str, object]


def schema(name: str, description: str, **parameters: tuple[str, str]) -> dict[str, object]:
    properties = {k: {"type": t, "description": d} for k, (t, d) in parameters.items()}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": properties, "required": list(properties)},
        },
    }


# tool -> (schema, templates of a request, make(rng) -> (arguments, result, sentence of the answer))
Tool = tuple[dict[str, object], tuple[str, ...], Callable[[random.Random], tuple[Args, object, str]]]
TOOLS: dict[str, Tool] = {}


def tool(
    spec: dict[str, object], *templates: str
) -> Callable[[Callable[[random.Random], tuple[Args, object, str]]], None]:
    def add(make: Callable[[random.Random], tuple[Args, object, str]]) -> None:
        TOOLS[str(spec["function"]["name"])] = (spec, templates, make)  # type: ignore[index]

    return add


@tool(
    schema("get_weather", "Get the weather for a city", city=("string", "The city name")),
    "What is the weather in {city}?",
    "How is the weather in {city} today?",
    "Tell me the weather in {city}.",
    "Is it warm in {city}?",
    "Weather in {city}?",
    "Check the weather in {city}.",
    "What is the weather like in {city}?",
    "How warm is it in {city}?",
    "I want to know the weather in {city}.",
)
def weather(rng: random.Random) -> tuple[Args, object, str]:
    city, t, sky = rng.choice(CITIES), rng.randint(-5, 35), rng.choice(["sunny", "cloudy", "rainy", "windy", "clear"])
    return {"city": city}, {"temperature": t, "condition": sky}, f"The weather in {city} is {sky} with {t} degrees."


@tool(
    schema("add", "Add two numbers", a=("number", "First number"), b=("number", "Second number")),
    "Use the tool to add {a} and {b}.",
    "What is {a} + {b}? Use a tool.",
    "Add {a} and {b} with the tool.",
    "Call the tool to add {a} and {b}.",
    "Let the tool compute {a} + {b}.",
    "With the tool: {a} plus {b}?",
    "Please add {a} to {b} with a tool.",
)
def add(rng: random.Random) -> tuple[Args, object, str]:
    a, b = rng.randint(0, 9999), rng.randint(0, 9999)
    return {"a": a, "b": b}, a + b, f"{a} + {b} = {a + b}"


@tool(
    schema("multiply", "Multiply two numbers", a=("number", "First number"), b=("number", "Second number")),
    "Use the tool to multiply {a} by {b}.",
    "What is {a} * {b}? Use a tool.",
    "Multiply {a} and {b} with the tool.",
    "Call the tool to multiply {a} and {b}.",
    "Let the tool compute {a} * {b}.",
    "With the tool: {a} times {b}?",
    "Please multiply {a} by {b} with a tool.",
)
def multiply(rng: random.Random) -> tuple[Args, object, str]:
    a, b = rng.randint(0, 999), rng.randint(0, 999)
    return {"a": a, "b": b}, a * b, f"{a} * {b} = {a * b}"


@tool(
    schema(
        "search",
        "Search the web for information",
        query=("string", "Search query"),
        num_results=("integer", "Number of results to return"),
    ),
    "Search the web for {query} and give me {num_results} results.",
    "Find {num_results} pages about {query}.",
    "Look up {query} and show {num_results} results.",
    "Search for {query}, {num_results} results please.",
    "Give me {num_results} search results for {query}.",
    "I need {num_results} pages on {query}.",
)
def search(rng: random.Random) -> tuple[Args, object, str]:
    q, n = " ".join(words(rng, rng.randint(1, 2))), rng.randint(1, 5)
    pages = [f"{q} {w}" for w in words(rng, n)]
    return {"query": q, "num_results": n}, pages, f"I found {n} results: " + ", ".join(pages) + "."


@tool(
    schema("get_time", "Get the current time in a city", city=("string", "The city name")),
    "What time is it in {city}?",
    "Tell me the current time in {city}.",
    "Which time do they have in {city} now?",
    "Time in {city}?",
    "What is the time in {city}?",
    "What is the current time in {city}?",
    "How late is it in {city}?",
    "Check the time in {city}.",
)
def clock(rng: random.Random) -> tuple[Args, object, str]:
    city, t = rng.choice(CITIES), f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    return {"city": city}, t, f"It is {t} in {city}."


@tool(
    schema("read_file", "Read a text file", path=("string", "Path of the file")),
    "Read the file {path}.",
    "What is in the file {path}?",
    "Show me the content of {path}.",
    "Open {path}.",
    "Open the file {path} and tell me what it says.",
    "What does {path} contain?",
    "Print the file {path}.",
    "Please read {path}.",
)
def read_file(rng: random.Random) -> tuple[Args, object, str]:
    path, text = f"{word(rng)}.{rng.choice(['txt', 'md', 'log', 'py'])}", " ".join(words(rng, rng.randint(2, 6)))
    return {"path": path}, text, f"The file {path} contains: {text}"


@tool(
    schema("set_timer", "Set a timer", minutes=("integer", "Length in minutes"), label=("string", "Name of the timer")),
    "Set a timer of {minutes} minutes called {label}.",
    "Start a timer named {label} for {minutes} minutes.",
    "I need a {minutes} minute timer for {label}.",
    "Timer for {label}, {minutes} minutes.",
    "Set a {minutes} minute timer for {label}.",
    "Please set a timer for {label}: {minutes} minutes.",
    "Remind me of {label} in {minutes} minutes.",
)
def timer(rng: random.Random) -> tuple[Args, object, str]:
    m, label = rng.randint(1, 90), word(rng)
    return {"minutes": m, "label": label}, {"ok": True}, f"The timer {label} is set to {m} minutes."


@tool(
    schema("send_mail", "Send a message", to=("string", "Name of the receiver"), text=("string", "The message")),
    "Send {to} the message: {text}",
    "Write to {to}: {text}",
    "Please tell {to} this: {text}",
    "Send this to {to}: {text}",
    "Message for {to}: {text}",
    "Tell {to}: {text}",
    "Send a message to {to} that says: {text}",
)
def mail(rng: random.Random) -> tuple[Args, object, str]:
    to, text = rng.choice(NAMES), " ".join(words(rng, rng.randint(2, 5)))
    return {"to": to, "text": text}, {"sent": True}, f"I sent the message to {to}."


@tool(
    schema("get_price", "Get the price of an item", item=("string", "The item"), currency=("string", "Currency code")),
    "What does a {item} cost in {currency}?",
    "Price of {item} in {currency}?",
    "How much is the {item} in {currency}?",
    "Tell me the price of a {item} in {currency}.",
    "What is the price of the {item} in {currency}?",
    "How many {currency} does a {item} cost?",
    "Check the {currency} price of a {item}.",
)
def price(rng: random.Random) -> tuple[Args, object, str]:
    item, c, p = word(rng), rng.choice(["EUR", "USD", "GBP", "JPY"]), rng.randint(1, 999)
    return {"item": item, "currency": c}, {"price": p}, f"The {item} costs {p} {c}."


def request(rng: random.Random, name: str, held: bool) -> tuple[str, Args, object, str]:
    _, templates, make = TOOLS[name]
    unseen = [t for t in templates[1:] if fraction(f"template/{name}/{t}") < 0.3]
    args, result, sentence = make(rng)
    return (
        rng.choice(unseen if held and unseen else [t for t in templates if t not in unseen]).format(**args),
        args,
        result,
        sentence,
    )


def call(ident: str, name: str, args: Args) -> dict[str, object]:
    return {
        "id": ident,
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(args, ensure_ascii=False)},
    }


def think(names: list[str]) -> str:
    return f"I should call {' and then '.join(names)}."


def conversation(rng: random.Random, held: bool) -> Conversation:
    """One request; the last message is the assistant's, so that the whole text is trained on."""
    mode = rng.choice(["thinking", "chat"])
    names = rng.sample(sorted(TOOLS), rng.randint(1, 3))
    kind = rng.choice(["one", "one", "one", "both", "chain", "again"]) if len(names) > 1 else "one"
    asked = [request(rng, n, held) for n in names[: 1 if kind == "one" else 2]]
    messages: list[dict[str, object]] = []
    if rng.random() < 0.5:
        messages.append(
            {
                "role": "system",
                "content": rng.choice(["You are a helpful assistant.", "Use the tools when they help.", "Be brief."]),
            }
        )

    def assistant(content: str, reasoning: str, calls: list[dict[str, object]] | None = None) -> None:
        messages.append(
            {"role": "assistant", "content": content, "reasoning_content": reasoning}
            | ({"tool_calls": calls} if calls else {})
        )

    def result(ident: str, value: object) -> None:
        messages.append(
            {"role": "tool", "tool_call_id": ident, "content": value if isinstance(value, str) else json.dumps(value)}
        )

    if kind in ("both", "chain"):
        messages.append({"role": "user", "content": asked[0][0] + " " + asked[1][0]})
        calls = [call(f"call_{i}", names[i], asked[i][1]) for i in range(2)]
        for batch in [calls] if kind == "both" else [[c] for c in calls]:
            first = int(str(batch[0]["id"])[-1])
            assistant("", think(names[first : first + len(batch)]), batch)
            for c in batch:
                result(str(c["id"]), asked[int(str(c["id"])[-1])][2])
        assistant(" ".join(a[3] for a in asked), "I have the results.")
    else:
        for i, (question, args, value, sentence) in enumerate(asked):
            messages.append({"role": "user", "content": question})
            assistant("", think([names[i]]), [call(f"call_{i}", names[i], args)])
            result(f"call_{i}", value)
            assistant(sentence, "I have the result.")
    return Conversation(f"tool_{kind}", messages, mode, [TOOLS[n][0] for n in names], str(messages[-1]["content"]))
