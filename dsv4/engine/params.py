"""SamplingParams: what one request asks of the sampler and when it stops. Names and meanings are vLLM's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsv4.errors import RequestError

GREEDY_BELOW = 1e-5  # temperatures under this are 0, as in vLLM
MAX_BIAS = 100.0


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop; validated when made (RequestError names the field, the value, the range).

    `temperature` 0 is greedy. `top_k` 0 or -1, `top_p` 1 and `min_p` 0 switch a filter off. The draws are a pure
    function of (seed, position in the output): equal logits give equal tokens whatever else is in the batch. `seed`
    None takes one from the engine's own. `max_tokens` None means as many as the context allows. `logprobs` counts
    alternatives beside the sampled token.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "stop", _strings(self.stop))
        put(self, "stop_token_ids", _token_ids(self.stop_token_ids))
        put(self, "logit_bias", _bias(self.logit_bias))
        _integer("n", self.n, 1)
        _integer("top_k", self.top_k, -1)
        put(self, "top_k", max(self.top_k, 0))
        _integer("min_tokens", self.min_tokens, 0)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1)
            if self.min_tokens > self.max_tokens:
                raise RequestError(f"min_tokens = {self.min_tokens} is more than max_tokens = {self.max_tokens}")
        put(self, "temperature", _number("temperature", self.temperature, 0.0))
        if self.temperature < GREEDY_BELOW:
            put(self, "temperature", 0.0)
        put(self, "top_p", _number("top_p", self.top_p, 0.0, 1.0, above=True))
        put(self, "min_p", _number("min_p", self.min_p, 0.0, 1.0))
        put(self, "repetition_penalty", _number("repetition_penalty", self.repetition_penalty, 0.0, above=True))
        for name in ("presence_penalty", "frequency_penalty"):
            put(self, name, _number(name, getattr(self, name), -2.0, 2.0))
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, got {getattr(self, name)!r}")

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)


def _strings(value: Any) -> tuple[str, ...]:
    items = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(items, Sequence) or not all(isinstance(item, str) and item for item in items):
        raise RequestError(f"stop must be a non-empty string or a list of them, got {value!r}")
    return tuple(items)


def _token_ids(value: Any) -> tuple[int, ...]:
    items = () if value is None else value
    if isinstance(items, str | bytes) or not isinstance(items, Sequence):
        raise RequestError(f"stop_token_ids must be a list of token ids, got {value!r}")
    return tuple(_integer("stop_token_ids", token, 0) for token in items)


def _integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        raise RequestError(f"{name} must be {_range(low, high)}, got {value}")
    return value


def _number(name: str, value: Any, low: float, high: float = math.inf, *, above: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or not low <= value <= high or (above and value == low):
        limit = None if high == math.inf else high
        raise RequestError(f"{name} must be finite and {_range(low, limit, above=above)}, got {value}")
    return float(value)


def _range(low: float, high: float | None, *, above: bool = False) -> str:
    if high is None:
        return f"{'above' if above else 'at least'} {low:g}"
    return f"in {'(' if above else '['}{low:g}, {high:g}]"


def _bias(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RequestError(f"logit_bias must map token ids to numbers, got {value!r}")
    bias = {}
    for token, amount in value.items():
        if isinstance(token, str) and token.isascii() and token.isdigit():  # JSON objects have string keys
            token = int(token)
        bias[_integer("logit_bias token", token, 0)] = _number("logit_bias", amount, -MAX_BIAS, MAX_BIAS)
    return bias
