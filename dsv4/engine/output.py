"""What a finished request looks like. Names and shapes are vLLM's, so that code written for it reads the same here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort"]


class Logprob(NamedTuple):
    """One candidate token at one position: natural-log probability before bias, penalties and temperature."""

    logprob: float
    rank: int
    """1 = most likely."""
    decoded_token: str | None
    """None without a tokenizer."""


PositionLogprobs = dict[int, Logprob]


@dataclass(frozen=True)
class CompletionOutput:
    """One of the `n` answers to a prompt."""

    index: int
    text: str
    """Empty without a tokenizer; without the stop string unless include_stop_str_in_output."""
    token_ids: list[int]
    """Every sampled token, an end token included."""
    finish_reason: FinishReason | None
    """stop: end token, stop token or stop string; length: max_tokens or the context is used up; None: still running."""
    stop_reason: int | str | None
    """The stop token or stop string that was met; None for the end of sequence, as for any other reason."""
    cumulative_logprob: float | None
    """Sum over token_ids; None unless logprobs were asked for."""
    logprobs: list[PositionLogprobs] | None
    message: dict[str, Any] | None = None
    """A chat answer as an OpenAI-shaped message: role, reasoning_content, content, tool_calls."""


@dataclass(frozen=True)
class RequestMetrics:
    """Seconds on the clock of time.monotonic(); a time is None if that moment never came."""

    arrival_time: float
    first_scheduled_time: float | None
    first_token_time: float | None
    finished_time: float | None


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its answers."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[PositionLogprobs | None] | None
    """One entry per prompt token; the first is None, nothing predicts it."""
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
