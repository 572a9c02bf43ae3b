"""What a run did and how fast: tokens, seconds, steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class RunMetrics:
    """Counters of an engine since it was made, or of one run (the difference of two). Seconds are of the whole step,
    sampling included; a request's first token belongs to its prefill.
    """

    requests: int = 0
    failed_requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    decode_seconds: float = 0.0

    def __sub__(self, before: RunMetrics) -> RunMetrics:
        earlier = asdict(before)
        return RunMetrics(**{name: value - earlier[name] for name, value in asdict(self).items()})

    def copy(self) -> RunMetrics:
        return RunMetrics(**asdict(self))

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0
