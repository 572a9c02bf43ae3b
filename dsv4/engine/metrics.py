"""What a run did and how fast: tokens, seconds, steps, and the bytes a token must read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from dsv4.kernels.grouped_linear.operand import GroupedOperand
from dsv4.kernels.linear.operand import LinearOperand
from dsv4.kernels.moe.operand import ExpertsOperand
from dsv4.model import Model


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


def weight_bytes_per_token(model: Model) -> int:
    """Stored bytes of the linears that one decoded token reads: K of the E routed experts, everything else once."""
    share = model.config.num_experts_per_tok / model.config.n_routed_experts
    operands = [model.vocabulary.operand, *(operand for block in model.blocks for operand in _operands(block))]
    read: dict[int, float] = {}  # operands may share a weight
    for operand in operands:
        if isinstance(operand, LinearOperand):
            read |= {id(p.weight): p.weight.nbytes for p in operand.projections}
        else:
            read[id(operand)] = operand.nbytes * (share if isinstance(operand, ExpertsOperand) else 1)
    return round(sum(read.values()))


def _operands(part: object) -> Iterator[LinearOperand | GroupedOperand | ExpertsOperand]:
    """The operands of a layer object and of the layer objects in it."""
    for value in vars(part).values():
        if isinstance(value, LinearOperand | GroupedOperand | ExpertsOperand):
            yield value
        elif type(value).__module__.startswith("dsv4.layers."):
            yield from _operands(value)
