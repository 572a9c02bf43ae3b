"""CUDA sources as C++ for one processor: inline PTX becomes calls, `__shared__` variables places in a block's memory.

Nothing else is changed, and lines stay where they are: the headers in include/ give the rest of CUDA a meaning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tools.emulate.ptx import FUNCTIONS

_ASM = re.compile(r"\basm\b(?:\s+volatile\b)?\s*\(")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_OPERAND = re.compile(r'\s*"[^"]*"\s*\((.*)\)\s*', re.DOTALL)
_SHARED = re.compile(r"\b(extern\s+)?__shared__\s+(?:__align__\(\d+\)\s+)?([\w:]+(?:<[^;]*?>)?)\s+([^;]+);")
_DECLARED = re.compile(r"\s*(\w+)\s*((?:\[.*\])?)\s*", re.DOTALL)
_SKIPPED = re.compile(r'//[^\n]*|"(?:[^"\\\n]|\\.)*"')


def translated(source: str, name: str) -> str:
    """name: where the source lies, for messages of the compiler and of the machine."""
    text, at, made = source, 0, []
    while found := _ASM.search(text, at):
        end = _closing(text, found.end() - 1)
        made += text[at : found.start()], _call(text[found.end() : end])
        made.append("\n" * text.count("\n", found.start(), end))
        at = end + 1
    made.append(text[at:])
    return f'#line 1 "{name}"\n' + _SHARED.sub(_shared, "".join(made))


def _call(inside: str) -> str:
    """The call for what stands in an asm statement's parentheses."""
    parts = list(_split(inside, ":"))
    words = "".join(_STRING.findall(parts[0])).replace("\\n", " ")
    text = re.sub(r",\s*", ", ", " ".join(words.split()))
    operands = [_OPERAND.fullmatch(operand) for part in parts[1:3] for operand in _split(part, ",") if operand.strip()]
    given = ", ".join(" ".join(operand[1].split()) for operand in operands if operand)
    known = FUNCTIONS.get(text)
    if known is None:  # the compiler says where, if the code is compiled at all
        return f'emulate::ptx_that_nobody_emulates(R"({text})")'
    return f"emulate::ptx::{known}({given})"


def _shared(found: re.Match[str]) -> str:
    made = []
    for declared in _split(found[3], ","):
        match = _DECLARED.fullmatch(declared)
        assert match is not None, found[0]
        name, dims = match.groups()
        if found[1]:
            made.append(f"{found[2]}* const {name} = reinterpret_cast<{found[2]}*>(emulate::dynamic_memory);")
        else:
            kind = f"{found[2]}{dims}"
            made.append(
                f"static const unsigned {name}_at = emulate::reserve(sizeof({kind})); "
                f"auto& {name} = emulate::shared_variable<{kind}>({name}_at);"
            )
    return " ".join(made) + "\n" * found[0].count("\n")


def _closing(text: str, at: int) -> int:
    """Where the parenthesis that opens at `at` closes."""
    depth = 0
    while True:
        if skipped := _SKIPPED.match(text, at):
            at = skipped.end()
            continue
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at
        at += 1


def _split(text: str, by: str) -> Iterator[str]:
    """The parts between separators that stand in no string or bracket. `::` separates twice, but not in a name."""
    depth = start = at = 0
    while at < len(text):
        if skipped := _SKIPPED.match(text, at):
            at = skipped.end()
            continue
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(text[at], 0)
        if depth == 0 and text[at] == by:
            yield text[start:at]
            start = at + 1
        at += 1
    yield text[start:]
