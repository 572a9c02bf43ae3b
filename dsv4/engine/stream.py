"""An answer while it is being written."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Self

from dsv4.engine.chat import thinking_mode
from dsv4.engine.engine import Engine
from dsv4.engine.metrics import RunMetrics
from dsv4.engine.output import RequestOutput
from dsv4.engine.params import SamplingParams
from dsv4.engine.prompts import Prompt
from dsv4.errors import RequestError
from dsv4.text.stream import CompletionSplitter, Delta


class TextStream(Iterator[str]):
    """Pieces of text as they become certain. The request is queued when the stream is made and dropped when the stream
    is closed, leaves its `with` block or is forgotten. Other requests of the engine move on in the same steps.
    """

    def __init__(self, engine: Engine, prompt: Prompt, params: SamplingParams):
        if params.n != 1:
            raise RequestError(f"a stream carries one answer, but n = {params.n}; use generate, or one stream each")
        self._engine, self._before = engine, engine.metrics.copy()
        self._request = engine.add(prompt.token_ids, params, prompt=prompt.text)
        self._sequence = self._request.sequences[0]

    def __next__(self) -> str:
        sequence = self._sequence
        while True:
            if text := sequence.take_text():
                return text
            if sequence.error is not None:
                raise sequence.error
            if sequence.finished:
                raise StopIteration
            self._engine.step()

    @property
    def output(self) -> RequestOutput:
        """Everything so far; `finished` says whether that is all."""
        return self._request.output()

    @property
    def metrics(self) -> RunMetrics:
        """What the engine did since this stream was made."""
        return self._engine.metrics - self._before

    def close(self) -> None:
        """Drop the request if it still runs."""
        self._engine.abort(self._request.request_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_sequence"):
            self.close()


class ChatStream(Iterator[Delta]):
    """Reasoning, content and complete tool calls of one answer, as CompletionSplitter tells them apart."""

    def __init__(self, text: TextStream, thinking: bool):
        self.text = text
        self._splitter = CompletionSplitter(thinking_mode(thinking))
        self._ready: deque[Delta] = deque()
        self._ended = False

    def __next__(self) -> Delta:
        while not self._ready and not self._ended:
            piece = next(self.text, None)
            self._ended = piece is None
            self._ready.extend(self._splitter.finish() if piece is None else self._splitter.feed(piece))
        if not self._ready:
            raise StopIteration
        return self._ready.popleft()

    @property
    def output(self) -> RequestOutput:
        return self.text.output

    @property
    def metrics(self) -> RunMetrics:
        return self.text.metrics

    def close(self) -> None:
        self.text.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
