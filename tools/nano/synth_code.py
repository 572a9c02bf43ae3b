"""'Write a Python function that ...': small functions that are right (each is executed once by `check()`)."""

from __future__ import annotations

import random

from synth_base import Fill, task

# name, what it does, arguments, body lines, one call and its result
FUNCTIONS: list[tuple[str, str, str, str, str, object]] = [
    ("add", "adds two numbers", "a, b", "return a + b", "add(2, 3)", 5),
    ("subtract", "subtracts one number from another", "a, b", "return a - b", "subtract(5, 3)", 2),
    ("multiply", "multiplies two numbers", "a, b", "return a * b", "multiply(2, 3)", 6),
    ("square", "returns the square of a number", "x", "return x * x", "square(4)", 16),
    ("cube", "returns the cube of a number", "x", "return x ** 3", "cube(2)", 8),
    ("is_even", "checks whether a number is even", "n", "return n % 2 == 0", "is_even(4)", True),
    ("is_odd", "checks whether a number is odd", "n", "return n % 2 == 1", "is_odd(4)", False),
    (
        "factorial",
        "computes the factorial of a number",
        "n",
        "result = 1\nfor i in range(2, n + 1):\n    result *= i\nreturn result",
        "factorial(5)",
        120,
    ),
    (
        "fibonacci",
        "returns the n-th Fibonacci number",
        "n",
        "a, b = 0, 1\nfor _ in range(n):\n    a, b = b, a + b\nreturn a",
        "fibonacci(7)",
        13,
    ),
    (
        "is_prime",
        "checks whether a number is prime",
        "n",
        "if n < 2:\n    return False\nfor i in range(2, int(n ** 0.5) + 1):\n    if n % i == 0:\n        return False\nreturn True",
        "is_prime(7)",
        True,
    ),
    (
        "gcd",
        "computes the greatest common divisor of two numbers",
        "a, b",
        "while b:\n    a, b = b, a % b\nreturn a",
        "gcd(12, 18)",
        6,
    ),
    (
        "maximum",
        "returns the largest item of a list",
        "items",
        "best = items[0]\nfor item in items:\n    if item > best:\n        best = item\nreturn best",
        "maximum([1, 5, 3])",
        5,
    ),
    (
        "minimum",
        "returns the smallest item of a list",
        "items",
        "best = items[0]\nfor item in items:\n    if item < best:\n        best = item\nreturn best",
        "minimum([4, 2, 3])",
        2,
    ),
    (
        "total",
        "sums a list of numbers",
        "numbers",
        "result = 0\nfor number in numbers:\n    result += number\nreturn result",
        "total([1, 2, 3])",
        6,
    ),
    (
        "mean",
        "computes the mean of a list of numbers",
        "numbers",
        "return sum(numbers) / len(numbers)",
        "mean([1, 2, 3])",
        2.0,
    ),
    ("reverse", "reverses a string", "text", "return text[::-1]", "reverse('abc')", "cba"),
    (
        "is_palindrome",
        "checks whether a string is a palindrome",
        "text",
        "return text == text[::-1]",
        "is_palindrome('abba')",
        True,
    ),
    (
        "count_vowels",
        "counts the vowels in a string",
        "text",
        "return sum(c in 'aeiou' for c in text.lower())",
        "count_vowels('hello')",
        2,
    ),
    ("count_words", "counts the words in a string", "text", "return len(text.split())", "count_words('a b c')", 3),
    (
        "capitalize_words",
        "capitalizes every word of a string",
        "text",
        "return ' '.join(w.capitalize() for w in text.split())",
        "capitalize_words('a b')",
        "A B",
    ),
    (
        "remove_duplicates",
        "removes duplicates from a list and keeps the order",
        "items",
        "seen = set()\nresult = []\nfor item in items:\n    if item not in seen:\n        seen.add(item)\n        result.append(item)\nreturn result",
        "remove_duplicates([1, 1, 2])",
        [1, 2],
    ),
    (
        "flatten",
        "flattens a list of lists",
        "lists",
        "return [x for items in lists for x in items]",
        "flatten([[1], [2, 3]])",
        [1, 2, 3],
    ),
    (
        "chunks",
        "splits a list into chunks of size n",
        "items, n",
        "return [items[i:i + n] for i in range(0, len(items), n)]",
        "chunks([1, 2, 3], 2)",
        [[1, 2], [3]],
    ),
    (
        "read_text",
        "reads a text file",
        "path",
        "with open(path, encoding='utf-8') as file:\n    return file.read()",
        "",
        None,
    ),
    (
        "count_lines",
        "counts the lines of a file",
        "path",
        "with open(path, encoding='utf-8') as file:\n    return sum(1 for _ in file)",
        "",
        None,
    ),
    (
        "write_text",
        "writes text to a file",
        "path, text",
        "with open(path, 'w', encoding='utf-8') as file:\n    file.write(text)",
        "",
        None,
    ),
    (
        "word_counts",
        "counts how often each word occurs",
        "text",
        "counts = {}\nfor word in text.split():\n    counts[word] = counts.get(word, 0) + 1\nreturn counts",
        "word_counts('a b a')",
        {"a": 2, "b": 1},
    ),
    (
        "binary_search",
        "finds an item in a sorted list",
        "items, target",
        "low, high = 0, len(items) - 1\nwhile low <= high:\n    middle = (low + high) // 2\n    if items[middle] == target:\n        return middle\n    if items[middle] < target:\n        low = middle + 1\n    else:\n        high = middle - 1\nreturn -1",
        "binary_search([1, 3, 5], 3)",
        1,
    ),
    (
        "bubble_sort",
        "sorts a list with bubble sort",
        "items",
        "items = list(items)\nfor i in range(len(items)):\n    for j in range(len(items) - 1 - i):\n        if items[j] > items[j + 1]:\n            items[j], items[j + 1] = items[j + 1], items[j]\nreturn items",
        "bubble_sort([3, 1, 2])",
        [1, 2, 3],
    ),
    (
        "quicksort",
        "sorts a list with quicksort",
        "items",
        "if len(items) < 2:\n    return items\npivot = items[0]\nsmall = [x for x in items[1:] if x < pivot]\nlarge = [x for x in items[1:] if x >= pivot]\nreturn quicksort(small) + [pivot] + quicksort(large)",
        "quicksort([3, 1, 2])",
        [1, 2, 3],
    ),
    (
        "celsius_to_fahrenheit",
        "converts Celsius to Fahrenheit",
        "c",
        "return c * 9 / 5 + 32",
        "celsius_to_fahrenheit(100)",
        212.0,
    ),
    (
        "clamp",
        "clamps a value between a low and a high bound",
        "value, low, high",
        "return max(low, min(high, value))",
        "clamp(12, 0, 10)",
        10,
    ),
    (
        "invert",
        "swaps the keys and values of a dict",
        "mapping",
        "return {value: key for key, value in mapping.items()}",
        "invert({'a': 1})",
        {1: "a"},
    ),
    (
        "filter_even",
        "keeps the even numbers of a list",
        "numbers",
        "return [n for n in numbers if n % 2 == 0]",
        "filter_even([1, 2, 4])",
        [2, 4],
    ),
    ("digit_sum", "sums the digits of a number", "n", "return sum(int(d) for d in str(n))", "digit_sum(123)", 6),
    ("power", "raises a number to a power", "base, exponent", "return base ** exponent", "power(2, 8)", 256),
    ("merge", "merges two dicts", "a, b", "return {**a, **b}", "merge({'a': 1}, {'b': 2})", {"a": 1, "b": 2}),
    ("last", "returns the last item of a list", "items", "return items[-1]", "last([1, 2])", 2),
    ("first", "returns the first item of a list", "items", "return items[0]", "first([1, 2])", 1),
    (
        "contains",
        "checks whether a list contains an item",
        "items, target",
        "return target in items",
        "contains([1, 2], 2)",
        True,
    ),
    ("absolute", "returns the absolute value of a number", "x", "return -x if x < 0 else x", "absolute(-3)", 3),
    (
        "join_lines",
        "joins lines into one string",
        "lines",
        "return '\\n'.join(lines)",
        "join_lines(['a', 'b'])",
        "a\nb",
    ),
    ("swap_case", "swaps the case of a string", "text", "return text.swapcase()", "swap_case('aB')", "Ab"),
    ("parse_json", "parses a JSON string", "text", "import json\n\nreturn json.loads(text)", "parse_json('[1]')", [1]),
]


def source(name: str, args: str, body: str, doc: str = "") -> str:
    lines = ([f'"""{doc}"""'] if doc else []) + body.split("\n")
    return f"def {name}({args}):\n" + "\n".join("    " + line if line else "" for line in lines)


@task(
    "Write a Python function that {q}.",
    "Please write a Python function that {q}.",
    "I need a function in Python that {q}.",
    "Python: a function that {q}.",
    "Can you write a Python function that {q}?",
    "Give me Python code for a function that {q}.",
    weight=10,
)
def python_function(rng: random.Random) -> Fill:
    name, what, args, body, _, _ = rng.choice(FUNCTIONS)
    return {"q": what}, f"The function {name}({args}) {what}.", f"```python\n{source(name, args, body)}\n```"


@task(
    "Write a Python function {s} that {q} and show an example.",
    "Write the function {s}, which {q}. Add an example call.",
    "Python function {s} with an example: it {q}.",
    weight=4,
)
def python_example(rng: random.Random) -> Fill:
    name, what, args, body, call, result = rng.choice([f for f in FUNCTIONS if f[4]])
    text = f"```python\n{source(name, args, body, what.capitalize() + '.')}\n\n\nprint({call})  # {result!r}\n```"
    return {"q": what, "s": f"{name}({args})"}, f"The function {name} {what}; the example gives {result!r}.", text


@task(
    "What does this function do?\n```python\n{c}\n```",
    "Explain this Python code:\n```python\n{c}\n```",
    "Describe the following function.\n```python\n{c}\n```",
    weight=3,
)
def explain_code(rng: random.Random) -> Fill:
    name, what, args, body, _, _ = rng.choice(FUNCTIONS)
    return {"c": source(name, args, body)}, f"The function is called {name}.", f"The function {name} {what}."


def check() -> None:
    """Run every function's example."""
    for name, _, args, body, call, result in FUNCTIONS:
        scope: dict[str, object] = {}
        exec(source(name, args, body), scope)  # noqa: S102 - the table above
        assert not call or eval(call, scope) == result, name  # noqa: S307
