"""Completions as they arrive: bytes to text, stop strings, and text to reasoning, content and tool calls.

Each part takes its input in pieces of any size and gives, all pieces together, what it would give for the whole.
"""

import codecs
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dsv4.text.dsml import BLOCK_OPEN, BlockScanner
from dsv4.text.messages import is_thinking
from dsv4.text.tokenizer import Tokenizer
from dsv4.text.tokens import EOS, THINK_CLOSE, THINK_OPEN
from dsv4.text.tools import new_call_id, openai_call, without_cut_tag, without_gap


class Detokenizer:
    """Ids to text, one or more at a time; bytes of an unfinished UTF-8 character wait for their rest."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Iterable[int]) -> str:
        """Text that is certain after these ids."""
        return self._utf8.decode(self._tokenizer.decode_bytes(ids, skip_special=self._skip_special))

    def finish(self) -> str:
        """What was held back: U+FFFD for a character that never became complete, or nothing."""
        return self._utf8.decode(b"", True)


def held_back(text: str, tags: Iterable[str]) -> int:
    """Length of the longest end of text that may be the beginning of a tag (0: no tag can have begun)."""
    longest = max((len(tag) for tag in tags), default=0) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(tag.startswith(text[-length:]) for tag in tags):
            return length
    return 0


class StopStrings:
    """Passes text on until a stop string is complete; text that may be the beginning of one is held back.

    The stop string that is complete first wins; of several ending together, the longest. matched is that string, or
    None. Text from there on is swallowed (include_stop: the stop string itself is passed on).
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self._stops = [stop for stop in stops if stop]
        self._include_stop = include_stop
        self._text = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Text that is certain not to belong to a stop string."""
        if self.matched is not None:
            return ""
        self._text += text
        found = [(at + len(stop), -len(stop), stop) for stop in self._stops if (at := self._text.find(stop)) >= 0]
        if found:
            end, _, self.matched = min(found)
            out = self._text[: end if self._include_stop else end - len(self.matched)]
            self._text = ""
            return out
        keep = len(self._text) - held_back(self._text, self._stops)
        out, self._text = self._text[:keep], self._text[keep:]
        return out

    def finish(self) -> str:
        """What was held back."""
        out, self._text = self._text, ""
        return out


@dataclass(frozen=True)
class Delta:
    """One step of a streamed message: reasoning or content text, or one complete tool call in the OpenAI shape."""

    kind: Literal["reasoning", "content", "tool_call"]
    text: str = ""
    call: dict[str, Any] | None = None


class CompletionSplitter:
    """Splits a completion into deltas; together they are what parse_completion (tolerant) gives for the whole text.

    Tags never show up in deltas, not even partly: text that may be the beginning of one waits. The calls of a block
    come when the block is complete and right; a block that breaks the grammar becomes content; one that is cut off is
    dropped. With a prompt that continues an answer behind its reasoning, use thinking_mode="chat".
    """

    def __init__(self, thinking_mode: str = "thinking", *, call_ids: Callable[[], str] = new_call_id) -> None:
        self._call_ids = call_ids
        self._until_eos = StopStrings([EOS])
        self._text = ""
        self._gap = ""
        self._block = BlockScanner()
        self._step = self._start if is_thinking(thinking_mode) else self._content
        self._deltas: list[Delta] = []

    def feed(self, text: str) -> list[Delta]:
        """Deltas that are certain after this text."""
        self._take(self._until_eos.feed(text))
        return self._drain()

    def finish(self) -> list[Delta]:
        """Deltas of what was held back; call once, after the last text."""
        self._take(self._until_eos.finish())
        if self._step == self._content:
            self._emit("content", without_cut_tag(self._text))
        elif self._step != self._in_block:
            self._emit("reasoning", self._text)
        self._text = ""
        return self._drain()

    def _take(self, text: str) -> None:
        self._text += text
        step = None
        while step != self._step:  # a step that cannot go on leaves the state as it is
            step = self._step
            step()

    def _drain(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        return deltas

    def _emit(self, kind: Literal["reasoning", "content"], text: str) -> None:
        if text:
            self._deltas.append(Delta(kind, text))

    def _start(self) -> None:
        """A model may repeat the `<think>` that the prompt ends with."""
        if self._text.startswith(THINK_OPEN) or not THINK_OPEN.startswith(self._text):
            self._text = self._text.removeprefix(THINK_OPEN)
            self._step = self._reasoning

    def _reasoning(self) -> None:
        before, closed, after = self._text.partition(THINK_CLOSE)
        if closed:
            self._emit("reasoning", before)
            self._text, self._step = after, self._content
        else:
            keep = len(before) - held_back(before, (THINK_CLOSE,))
            self._emit("reasoning", before[:keep])
            self._text = before[keep:]

    def _content(self) -> None:
        start = self._text.find(BLOCK_OPEN)
        if start >= 0:
            before = without_gap(self._text[:start])
            self._gap = self._text[len(before) : start]
            self._block = BlockScanner()
            self._text, self._step = self._text[start:], self._in_block
        else:
            before = without_gap(self._text[: len(self._text) - held_back(self._text, (BLOCK_OPEN,))])
            self._text = self._text[len(before) :]
        self._emit("content", before)

    def _in_block(self) -> None:
        self._block.feed(self._text)
        self._text = ""
        if self._block.state == "malformed":
            self._emit("content", self._gap + self._block.taken())
            self._text, self._step = self._block.rest(), self._content
        elif self._block.state == "done":
            for name, arguments in self._block.calls:
                self._deltas.append(Delta("tool_call", call=openai_call(name, arguments, self._call_ids())))
            self._text, self._step = self._block.rest(), self._after_block

    def _after_block(self) -> None:
        self._text = self._text.lstrip()
        if self._text:
            self._step = self._content
