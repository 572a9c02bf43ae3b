"""A request while it runs: the prompt, its `n` sequences, and the moment each of them must stop."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv4.engine.output import (
    CompletionOutput,
    FinishReason,
    PositionLogprobs,
    RequestMetrics,
    RequestOutput,
)
from dsv4.engine.params import SamplingParams
from dsv4.engine.text import AnswerText
from dsv4.errors import Dsv4Error

CHILD_SEED_STEP = 0xD1342543DE82EF95  # odd, so that the n answers of a request draw from different streams


@dataclass(eq=False)
class Request:
    """One prompt with its parameters. `max_tokens` and the stop ids are resolved: no None, end of sequence included."""

    request_id: str
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    max_tokens: int
    eos_ids: frozenset[int]
    stop_ids: frozenset[int]
    sequences: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    arrival_time: float = field(default_factory=time.monotonic)
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None

    def __post_init__(self) -> None:
        self.prompt_tensor = torch.tensor(self.prompt_ids, dtype=torch.int64)
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
        self.sequences = [Sequence(self, i) for i in range(self.params.n)]

    @property
    def finished(self) -> bool:
        return all(s.finished for s in self.sequences)

    @property
    def error(self) -> Dsv4Error | None:
        """The first failure among the sequences."""
        return next((s.error for s in self.sequences if s.error is not None), None)

    def output(self) -> RequestOutput:
        """The state of now; `finished` says whether more will come."""
        times = RequestMetrics(self.arrival_time, self.first_scheduled_time, self.first_token_time, self.finished_time)
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids,
            prompt_logprobs=self.prompt_logprobs,
            outputs=[s.output() for s in self.sequences],
            finished=self.finished,
            metrics=times,
        )


class Sequence:
    """One of a request's answers. Holds a cache slot from admission until it has finished, and never longer."""

    def __init__(self, request: Request, index: int):
        self.request, self.params, self.index = request, request.params, index
        seed = (request.seed + index * CHILD_SEED_STEP) % 2**64
        self.seed = seed - 2**64 if seed >= 2**63 else seed
        self.slot: int | None = None
        self.prefilled = 0  # prompt tokens already in the cache
        self.token_ids: list[int] = []
        self.next_input: Tensor | None = None  # [1] i64, the last sampled token
        self.logprobs: list[PositionLogprobs] | None = None if self.params.logprobs is None else []
        self.cumulative_logprob: float | None = None if self.params.logprobs is None else 0.0
        self.text: AnswerText | None = None  # None without a tokenizer
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.error: Dsv4Error | None = None

    @property
    def name(self) -> str:
        several = self.params.n > 1
        return f"request {self.request.request_id}" + (f", answer {self.index}" if several else "")

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def reserved_tokens(self) -> int:
        """Cache entries this sequence may come to need; taken at admission, so that a running one never lacks room."""
        return len(self.request.prompt_ids) + self.request.max_tokens

    @property
    def below_min_tokens(self) -> bool:
        return len(self.token_ids) < self.params.min_tokens

    def decode_entry(self) -> tuple[int, Tensor]:
        """(slot, the last sampled token [1] i64), as Model.forward takes it."""
        assert self.slot is not None and self.next_input is not None, "only a prefilled sequence decodes"
        return self.slot, self.next_input

    def accept(self, token: int) -> None:
        """Append a sampled token and decide whether it was the last."""
        request, text = self.request, self.text
        may_stop = not self.below_min_tokens
        self.token_ids.append(token)
        ends = token in request.stop_ids
        if text is not None and (not ends or self.params.include_stop_str_in_output):
            text.push(token, watch=may_stop)
        if ends:
            self.finish_reason = "stop"
            self.stop_reason = None if token in request.eos_ids else token
        elif text is not None and text.stopped_by is not None:
            self.finish_reason, self.stop_reason = "stop", text.stopped_by
        elif len(self.token_ids) >= request.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None and text is not None:
            text.finish()

    def take_text(self) -> str:
        """Text that became certain since the last call."""
        return "" if self.text is None else self.text.take()

    def output(self) -> CompletionOutput:
        return CompletionOutput(
            index=self.index,
            text="" if self.text is None else self.text.text,
            token_ids=list(self.token_ids),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.logprobs is None else list(self.logprobs),
        )
