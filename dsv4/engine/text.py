"""The text of one answer as its tokens arrive: detokenised, watched for stop strings."""

from __future__ import annotations

from dsv4.engine.params import SamplingParams
from dsv4.text.stream import Detokenizer, StopStrings
from dsv4.text.tokenizer import Tokenizer


class AnswerText:
    """Text released so far; what may be the beginning of a stop string, or half a character, waits."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams):
        self._detokenizer = Detokenizer(tokenizer, skip_special=params.skip_special_tokens)
        self._stops = StopStrings(params.stop, include_stop=params.include_stop_str_in_output) if params.stop else None
        self._parts: list[str] = []
        self._taken = 0

    @property
    def text(self) -> str:
        return "".join(self._parts)

    @property
    def stopped_by(self) -> str | None:
        """The stop string that was met."""
        return None if self._stops is None else self._stops.matched

    def push(self, token: int, *, watch: bool) -> None:
        """Take one more token. `watch` False passes its text on without looking for stop strings."""
        text = self._detokenizer.feed((token,))
        self._parts.append(text if self._stops is None or not watch else self._stops.feed(text))

    def finish(self) -> None:
        """Release what was held back; call once, after the last token."""
        text = self._detokenizer.finish()
        self._parts.append(text if self._stops is None else self._stops.feed(text) + self._stops.finish())

    def take(self) -> str:
        """Text released since the last call."""
        text = "".join(self._parts[self._taken :])
        self._taken = len(self._parts)
        return text
