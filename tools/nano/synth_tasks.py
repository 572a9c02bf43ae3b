"""Tasks with one checkable answer: arithmetic, strings, lists, units, dates, JSON."""

from __future__ import annotations

import json
import random

from synth_base import CITIES, NAMES, Fill, task, word, words

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty".split()


def number(rng: random.Random) -> int:
    return rng.randint(0, 10 ** rng.randint(1, 3) - 1)


def columns(a: int, b: int, sign: int) -> str:
    """Column addition or subtraction, digit by digit from the right: the thinking text of the two tasks."""
    steps, carry = [], 0
    for i in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**i % 10, b // 10**i % 10
        if sign > 0:
            total = x + y + carry
            steps.append(f"{x} + {y}" + (" + 1" if carry else "") + f" = {total}" + (", carry 1" if total > 9 else ""))
            carry = int(total > 9)
        else:
            take = y + carry
            borrow = int(x < take)
            steps.append(
                f"{x} - {y}"
                + (" - 1" if carry else "")
                + f" = {x - take + 10 * borrow}"
                + (", borrow 1" if borrow else "")
            )
            carry = borrow
    return "From the right: " + "; ".join(steps) + "."


@task(
    "What is {a} + {b}?",
    "{a} + {b} = ?",
    "Add {a} and {b}.",
    "Compute {a} plus {b}.",
    "How much is {a} plus {b}?",
    "What is the sum of {a} and {b}?",
    weight=14,
)
def add(rng: random.Random) -> Fill:
    a, b = number(rng), number(rng)
    return {"a": a, "b": b}, columns(a, b, 1) + f" So {a + b}.", f"{a} + {b} = {a + b}"


@task(
    "What is {a} - {b}?",
    "{a} - {b} = ?",
    "Subtract {b} from {a}.",
    "Compute {a} minus {b}.",
    "How much is {a} minus {b}?",
    weight=9,
)
def subtract(rng: random.Random) -> Fill:
    b, a = sorted((number(rng), number(rng)))
    return {"a": a, "b": b}, columns(a, b, -1) + f" So {a - b}.", f"{a} - {b} = {a - b}"


@task("What is {a} times {b}?", "{a} * {b} = ?", "Multiply {a} by {b}.", "Compute {a} x {b}.", weight=6)
def multiply(rng: random.Random) -> Fill:
    a, b = rng.randint(2, 99), rng.randint(2, 9)
    tens, ones = a // 10 * 10, a % 10
    return (
        {"a": a, "b": b},
        f"{tens} * {b} = {tens * b} and {ones} * {b} = {ones * b}. {tens * b} + {ones * b} = {a * b}.",
        f"{a} * {b} = {a * b}",
    )


@task(
    "Which is larger, {a} or {b}?",
    "Which number is bigger: {a} or {b}?",
    "Tell me the larger of {a} and {b}.",
    "Compare {a} and {b}. Which is greater?",
    weight=2,
)
def larger(rng: random.Random) -> Fill:
    a, b = rng.sample(range(1000), 2)
    return (
        {"a": a, "b": b},
        f"Compare {a} and {b}: {max(a, b)} > {min(a, b)}.",
        f"{max(a, b)} is larger than {min(a, b)}.",
    )


@task("Is {a} even or odd?", "Is the number {a} odd or even?", "Tell me whether {a} is even or odd.")
def parity(rng: random.Random) -> Fill:
    a = number(rng)
    kind = "odd" if a % 2 else "even"
    return {"a": a}, f"The last digit of {a} is {a % 10}, which is {kind}.", f"{a} is {kind}."


@task("Count from {a} to {b}.", "List the numbers from {a} to {b}.", "Write all whole numbers from {a} up to {b}.")
def count(rng: random.Random) -> Fill:
    a = rng.randint(0, 95)
    b = a + rng.randint(3, 9)
    return {"a": a, "b": b}, f"Start at {a} and stop at {b}.", ", ".join(map(str, range(a, b + 1)))


@task(
    "Reverse the word {w}.", "Spell {w} backwards.", "Write the word {w} in reverse.", "What is {w} reversed?", weight=4
)
def reverse(rng: random.Random) -> Fill:
    w = word(rng)
    return {"w": w}, "Letters: " + " ".join(w) + ". Backwards: " + " ".join(w[::-1]) + ".", w[::-1]


@task(
    "Write {w} in upper case.",
    "Convert {w} to uppercase.",
    "Put the word {w} in capital letters.",
    "Uppercase: {w}",
    weight=4,
)
def upper(rng: random.Random) -> Fill:
    w = " ".join(words(rng, rng.randint(1, 3)))
    return {"w": w}, f"Upper case of {w}.", w.upper()


@task("Write {w} in lower case.", "Convert {w} to lowercase.", "Lowercase: {w}")
def lower(rng: random.Random) -> Fill:
    w = " ".join(words(rng, rng.randint(1, 2)))
    return {"w": w.upper()}, f"Lower case of {w.upper()}.", w


@task(
    "How many letters are in the word {w}?",
    "Count the letters in {w}.",
    "How long is the word {w}?",
    "What is the length of the word {w}?",
    weight=2,
)
def letters(rng: random.Random) -> Fill:
    w = word(rng)
    steps = " ".join(f"{i}:{c}" for i, c in enumerate(w, 1))
    return {"w": w}, f"{steps}. So {len(w)}.", f"The word {w} has {len(w)} letters."


@task(
    "What is the first letter of {w}?", "Which letter does {w} start with?", "Give me the first letter of the word {w}."
)
def first_letter(rng: random.Random) -> Fill:
    w = word(rng)
    return {"w": w}, f"Letters: {' '.join(w)}. First: {w[0]}.", w[0]


@task("What is the last letter of {w}?", "Which letter does {w} end with?", "Give me the last letter of the word {w}.")
def last_letter(rng: random.Random) -> Fill:
    w = word(rng)
    return {"w": w}, f"Letters: {' '.join(w)}. Last: {w[-1]}.", w[-1]


@task("Spell the word {w}.", "Spell {w} with dashes between the letters.", "Write {w} letter by letter.", weight=2)
def spell(rng: random.Random) -> Fill:
    w = word(rng)
    return {"w": w}, f"The word is {w}.", "-".join(w)


@task(
    "Sort these numbers: {x}",
    "Sort the list {x} from small to large.",
    "Put {x} in ascending order.",
    "Order these numbers: {x}",
    weight=3,
)
def sort_numbers(rng: random.Random) -> Fill:
    x = rng.sample(range(100), rng.randint(3, 6))
    s = ", ".join(map(str, sorted(x)))
    return {"x": ", ".join(map(str, x))}, f"Smallest {min(x)}, largest {max(x)}.", s


@task("Sort these words: {x}", "Sort alphabetically: {x}", "Put these words in alphabetical order: {x}", weight=6)
def sort_words(rng: random.Random) -> Fill:
    x = words(rng, rng.randint(3, 5))
    return {"x": ", ".join(x)}, "First letters: " + " ".join(w[0] for w in x) + ".", ", ".join(sorted(x))


@task("What is the largest of {x}?", "Find the maximum of {x}.", "Which is the largest number in this list: {x}?")
def maximum(rng: random.Random) -> Fill:
    x = rng.sample(range(200), rng.randint(3, 6))
    return {"x": ", ".join(map(str, x))}, f"Look at each: the largest is {max(x)}.", f"The largest is {max(x)}."


@task("What is the smallest of {x}?", "Find the minimum of {x}.", "Which is the smallest number in this list: {x}?")
def minimum(rng: random.Random) -> Fill:
    x = rng.sample(range(200), rng.randint(3, 6))
    return {"x": ", ".join(map(str, x))}, f"Look at each: the smallest is {min(x)}.", f"The smallest is {min(x)}."


@task("How many items are in this list: {x}?", "Count the items: {x}", "How many words are here: {x}?", weight=3)
def how_many(rng: random.Random) -> Fill:
    x = words(rng, rng.randint(2, 8))
    return {"x": ", ".join(x)}, " ".join(f"{i}:{w}" for i, w in enumerate(x, 1)) + ".", f"There are {len(x)} items."


@task("Is {w} in this list: {x}?", "Does the list {x} contain {w}?", "Here is a list: {x}. Is {w} in it?", weight=4)
def member(rng: random.Random) -> Fill:
    x = words(rng, rng.randint(3, 6) + 1)
    w = x.pop() if rng.random() < 0.5 else rng.choice(x)
    there = w in x
    return (
        {"x": ", ".join(x), "w": w},
        f"Look for {w}: {'found' if there else 'not found'}.",
        f"Yes, {w} is in the list." if there else f"No, {w} is not in the list.",
    )


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
