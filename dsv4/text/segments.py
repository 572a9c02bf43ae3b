"""A prompt in pieces that know who wrote them: the template (trusted) or the client (untrusted)."""

from collections.abc import Iterator
from typing import NamedTuple


class Segment(NamedTuple):
    """One piece of a prompt. Control tokens inside `text` count as control tokens only when it is trusted."""

    text: str
    trusted: bool


class SegmentList:
    """Collects segments in order; neighbours of the same trust are joined and empty pieces left out."""

    def __init__(self) -> None:
        self._parts: list[list[str]] = []
        self._trust: list[bool] = []

    def trusted(self, text: str) -> None:
        """Append text of the template."""
        self._append(text, True)

    def untrusted(self, text: str) -> None:
        """Append text that a client, a tool or the model wrote."""
        self._append(text, False)

    def extend(self, segments: "SegmentList") -> None:
        """Append all segments of another list."""
        for text, trusted in segments:
            self._append(text, trusted)

    def _append(self, text: str, trusted: bool) -> None:
        if not text:
            return
        if self._trust and self._trust[-1] is trusted:
            self._parts[-1].append(text)
        else:
            self._parts.append([text])
            self._trust.append(trusted)

    def __iter__(self) -> Iterator[Segment]:
        return (Segment("".join(parts), trusted) for parts, trusted in zip(self._parts, self._trust, strict=True))

    def __str__(self) -> str:
        return "".join(text for text, _ in self)
