"""String constants of a Python source file, read from its syntax tree; nothing of the file is ever run."""

import ast
from collections.abc import Mapping
from dataclasses import dataclass

from dsv4.errors import CheckpointError


@dataclass(frozen=True)
class Unreadable:
    """A constant without a literal value, for example one that a call computes."""

    reason: str


Text = str | Unreadable
Constant = Text | dict[str, Text]


def read_constants(source: str, name: str) -> dict[str, Constant]:
    """Module-level assignments whose value is a string literal, or a dict of string literals.

    Understood: implicit and `+` concatenation, parentheses, triple quotes, raw strings, names of earlier string
    constants, and f-strings that hold only such names. Later assignments win, as they do in Python. Anything else
    maps to Unreadable with its line. Raises CheckpointError if the source is not Python.
    """
    try:
        module = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{name}: not a Python file ({str(error) or type(error).__name__})") from error
    constants: dict[str, Constant] = {}
    for statement in module.body:
        if isinstance(statement, ast.Assign):
            targets, value = statement.targets, statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets, value = [statement.target], statement.value
        else:
            continue
        for target in targets:
            if isinstance(target, ast.Name):
                constants[target.id] = _constant(target.id, value, constants)
    return constants


def _constant(name: str, node: ast.expr, known: Mapping[str, Constant]) -> Constant:
    if not isinstance(node, ast.Dict):
        return _text(name, node, known)
    entries: dict[str, Text] = {}
    for key, value in zip(node.keys, node.values, strict=True):
        label = _text(name, key or node, known)  # key None is a `**` expansion
        if isinstance(label, Unreadable):
            return label
        entries[label] = _text(f"{name}[{label}]", value, known)
    return entries


def _text(name: str, node: ast.expr, known: Mapping[str, Constant]) -> Text:
    try:
        return _literal(node, known)
    except _NotLiteral as found:
        return Unreadable(f"{name} is not a string literal (line {node.lineno}: {found}) and code is never executed")
    except RecursionError:
        return Unreadable(f"{name} is nested too deeply (line {node.lineno})")


def _literal(node: ast.expr, known: Mapping[str, Constant]) -> str:
    """Value of an expression made of string literals and known string constants; _NotLiteral otherwise."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _literal(node.left, known) + _literal(node.right, known)
    if isinstance(node, ast.Name):
        value = known.get(node.id)
        if isinstance(value, str):
            return value
    if isinstance(node, ast.JoinedStr):
        return "".join(_literal(part, known) for part in node.values)
    if isinstance(node, ast.FormattedValue) and node.conversion == -1 and node.format_spec is None:
        return _literal(node.value, known)
    raise _NotLiteral(type(node).__name__)


class _NotLiteral(Exception):
    """An expression that only running the file could evaluate."""
