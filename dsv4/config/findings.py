"""Typed reads of a dict that collect every problem, so that a bad file is reported once and in full."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dsv4.errors import ConfigError

_MISSING = object()


def show(value: Any) -> str:
    """`value` as JSON would show it, cut to one readable line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class Findings:
    """The problems found so far in one source."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.lines: list[str] = []

    def add(self, key: str, found: str, expected: str, do: str = "") -> None:
        self.lines.append(f"{key}: found {found}, expected {expected}" + (f"; {do}" if do else ""))

    def raise_if_any(self) -> None:
        """Raise one ConfigError with all lines; do nothing when there are none."""
        if self.lines:
            count = f"{len(self.lines)} finding" + ("s" if len(self.lines) > 1 else "")
            raise ConfigError(f"{self.where}: {count}\n" + "\n".join(f"  - {line}" for line in self.lines))


class Reader:
    """Reads keys of `data`; a bad or missing value becomes a finding and reads as None."""

    def __init__(self, data: Mapping[str, Any], findings: Findings, prefix: str = "") -> None:
        self.data, self.findings, self.prefix = data, findings, prefix

    def _get(self, key: str, expected: str) -> Any:
        value = self.data.get(key, _MISSING)
        if value is _MISSING:
            self.findings.add(self.prefix + key, "no such key", expected, "take the key from the model's config.json")
        return value

    def integer(self, key: str, minimum: int) -> int | None:
        """The integer at `key`, at least `minimum`."""
        expected = f"an integer >= {minimum}"
        value = self._get(key, expected)
        if value is _MISSING:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            self.findings.add(self.prefix + key, show(value), expected)
            return None
        return value

    def positive(self, key: str) -> float | None:
        """The finite number > 0 at `key`."""
        value = self._get(key, "a number > 0")
        if value is _MISSING:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
            self.findings.add(self.prefix + key, show(value), "a number > 0")
            return None
        return float(value)

    def listing(self, key: str, what: str, length: int | None, kind: type) -> list[Any] | None:
        """The list at `key`: `length` entries (None: any number) of type `kind`; `what` describes it in the message."""
        value = self._get(key, what)
        if value is _MISSING:
            return None
        if not isinstance(value, list) or not all(isinstance(v, kind) and not isinstance(v, bool) for v in value):
            self.findings.add(self.prefix + key, show(value), what)
            return None
        if length is not None and len(value) != length:
            self.findings.add(self.prefix + key, f"{len(value)} entries", f"{length}: {what}")
            return None
        return value
