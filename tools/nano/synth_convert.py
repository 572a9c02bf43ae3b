"""Tasks that turn one form into another: units, dates, JSON, repetition, the value of a Python expression."""

from __future__ import annotations

import json
import random

from synth_base import CITIES, NAMES, Fill, task, word, words

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty".split()


@task("Convert {a} {u} to {v}.", "How many {v} are {a} {u}?", "{a} {u} in {v}?", "Express {a} {u} in {v}.", weight=2)
def units(rng: random.Random) -> Fill:
    u, v, f = rng.choice(
        [
            ("kilometers", "meters", 1000),
            ("meters", "centimeters", 100),
            ("kilograms", "grams", 1000),
            ("hours", "minutes", 60),
            ("minutes", "seconds", 60),
            ("days", "hours", 24),
            ("weeks", "days", 7),
            ("liters", "milliliters", 1000),
        ]
    )
    a = rng.randint(1, 20)
    return {"a": a, "u": u, "v": v}, f"1 {u[:-1]} is {f} {v}; {a} * {f} = {a * f}.", f"{a} {u} = {a * f} {v}"


@task("What day comes after {d}?", "Which day follows {d}?", "Today is {d}. What day is tomorrow?")
def next_day(rng: random.Random) -> Fill:
    i = rng.randrange(7)
    return {"d": DAYS[i]}, f"After {DAYS[i]} comes {DAYS[(i + 1) % 7]}.", DAYS[(i + 1) % 7]


@task(
    "Today is {d}. What day is it in {n} days?",
    "If today is {d}, which day is it {n} days from now?",
    "Which day comes {n} days after {d}?",
)
def day_shift(rng: random.Random) -> Fill:
    i, n = rng.randrange(7), rng.randint(2, 7)
    chain = " ".join(DAYS[(i + k) % 7] for k in range(1, n + 1))
    return {"d": DAYS[i], "n": n}, f"Count {n}: {chain}.", DAYS[(i + n) % 7]


@task("Which month is number {n}?", "What is the name of month {n}?", "Name the month with number {n}.")
def month(rng: random.Random) -> Fill:
    n = rng.randint(1, 12)
    return {"n": n}, f"Month {n} of the year.", MONTHS[n - 1]


@task("Write {n} as a word.", "How do you write the number {n} in words?", "Spell out the number {n}.")
def number_word(rng: random.Random) -> Fill:
    n = rng.randint(0, 20)
    return {"n": n}, f"The number {n} in words.", NUMBERS[n]


@task(
    "Write as JSON: {s}",
    "Turn this sentence into JSON: {s}",
    "Give me a JSON object for this: {s}",
    "Extract the data as JSON: {s}",
    weight=3,
)
def to_json(rng: random.Random) -> Fill:
    name, age, city = rng.choice(NAMES), rng.randint(18, 80), rng.choice(CITIES)
    kind = rng.randrange(3)
    if kind == 0:
        s, data = f"{name} is {age} years old and lives in {city}.", {"name": name, "age": age, "city": city}
    elif kind == 1:
        item, n = word(rng), rng.randint(1, 99)
        s, data = f"{name} bought {n} {item} in {city}.", {"name": name, "count": n, "item": item, "city": city}
    else:
        item, price = word(rng), rng.randint(1, 500)
        s, data = f"The {item} costs {price} euros.", {"item": item, "price": price, "currency": "euro"}
    return {"s": s}, "Keys: " + ", ".join(data) + ".", json.dumps(data)


@task("Repeat after me: {s}", "Say exactly: {s}", "Repeat this text: {s}", "Echo: {s}", weight=3)
def repeat(rng: random.Random) -> Fill:
    s = " ".join(words(rng, rng.randint(2, 8)))
    return {"s": s}, "I repeat the text as it is.", s


@task("Join these words with commas: {x}", "Put commas between these words: {x}", "Make a comma-separated list of: {x}")
def join(rng: random.Random) -> Fill:
    x = words(rng, rng.randint(3, 6))
    return {"x": " ".join(x)}, f"{len(x)} words.", ", ".join(x)


@task("Remove the vowels from {w}.", "Write {w} without vowels.", "Drop all vowels in the word {w}.")
def no_vowels(rng: random.Random) -> Fill:
    w = word(rng)
    return {"w": w}, "Letters: " + " ".join(w) + ".", "".join(c for c in w if c not in "aeiou")


@task(
    "What does len({w!r}) return in Python?",
    "In Python, what is len({w!r})?",
    "Evaluate the Python expression len({w!r}).",
)
def py_len(rng: random.Random) -> Fill:
    w = word(rng)
    return {"w": w}, " ".join(f"{i}:{c}" for i, c in enumerate(w, 1)) + ".", f"len({w!r}) returns {len(w)}."


@task(
    "What does {e} evaluate to in Python?", "Evaluate in Python: {e}", "In Python, what is the value of {e}?", weight=2
)
def py_expression(rng: random.Random) -> Fill:
    a, b, w = rng.randint(0, 20), rng.randint(1, 20), rng.choice(words(rng, 1))
    e = rng.choice(
        [
            f"{a} < {b}",
            f"{a} == {b}",
            f"{a} + {b}",
            f"{w!r}.upper()",
            f"{w!r}[0]",
            f"{w!r}[::-1]",
            f"{a} % {b}",
            f"max({a}, {b})",
            f"[{a}, {b}] + [{a}]",
            f"not {a > b}",
        ]
    )
    value = repr(eval(e))  # noqa: S307 - the expression is one of those just above
    return {"e": e}, f"The value of {e}.", value
