"""Options shared by commands: a dataclass of options, written once, becomes parameters of the commands that take it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Spread every parameter whose type is a dataclass into its fields, which carry typer's annotations."""
    spread: list[inspect.Parameter] = []
    groups: dict[str, tuple[type, list[str]]] = {}
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        group = parameter.annotation
        if not dataclasses.is_dataclass(group):
            spread.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        assert isinstance(group, type)
        hints, fields = get_type_hints(group, include_extras=True), dataclasses.fields(group)
        groups[parameter.name] = group, [field.name for field in fields]
        for field in fields:
            default = field.default_factory() if callable(field.default_factory) else field.default
            spread.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name]
                )
            )

    def call(**values: Any) -> None:
        for name, (group, names) in groups.items():
            values[name] = group(**{field: values.pop(field) for field in names})
        function(**values)

    call.__name__, call.__doc__ = function.__name__, function.__doc__
    call.__signature__ = inspect.Signature(spread)  # type: ignore[attr-defined]
    call.__annotations__ = {}
    return call
