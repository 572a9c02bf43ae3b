"""Tasks with one checkable answer: arithmetic, letters and lists; more in synth_convert.py."""

from __future__ import annotations

import random

from synth_base import Fill, task, word, words


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
