"""The sampler's front: parameters of requests as rows of tensors, kept from step to step while the batch stays."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.engine.params import SamplingParams
from dsv4.engine.request import Sequence
from dsv4.kernels.sample.sample import Penalties, sample


class Rows:
    """Sampling parameters of one batch composition [B]. Counters and token counts move on by one token per step."""

    def __init__(self, sequences: list[Sequence], vocab_size: int, device: torch.device):
        self.sequences = list(sequences)
        self.vocab_size, self.device = vocab_size, device
        params = [s.params for s in sequences]
        self.temperature = self._tensor([p.temperature for p in params], torch.float32)
        self.seed = self._tensor([s.seed for s in sequences], torch.int64)
        self.counter = self._tensor([len(s.token_ids) for s in sequences], torch.int64)
        drawn = any(p.temperature > 0 for p in params)
        self.top_k = self._filter(drawn and any(p.top_k for p in params), [p.top_k for p in params], torch.int64)
        self.top_p = self._filter(drawn and any(p.top_p < 1 for p in params), [p.top_p for p in params], torch.float32)
        self.min_p = self._filter(drawn and any(p.min_p for p in params), [p.min_p for p in params], torch.float32)
        self.bias = self._bias(params)
        self.penalties = self._penalties(params)

    def _tensor(self, values: list[int] | list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def _filter(self, used: bool, values: list[int] | list[float], dtype: torch.dtype) -> Tensor | None:
        return self._tensor(values, dtype) if used else None

    def _bias(self, params: list[SamplingParams]) -> Tensor | None:
        if not any(p.logit_bias for p in params):
            return None
        bias = torch.zeros(len(params), self.vocab_size, device=self.device)
        for row, p in enumerate(params):
            if p.logit_bias:
                bias[row, list(p.logit_bias)] = self._tensor(list(p.logit_bias.values()), torch.float32)
        return bias

    def _penalties(self, params: list[SamplingParams]) -> Penalties | None:
        if not any(p.has_penalties for p in params):
            return None
        in_prompt = torch.zeros(len(params), self.vocab_size, dtype=torch.bool, device=self.device)
        counts = torch.zeros(len(params), self.vocab_size, dtype=torch.int32, device=self.device)
        for row, s in enumerate(self.sequences):
            in_prompt[row, s.request.prompt_ids] = True
            counts[row] = torch.bincount(self._tensor(s.token_ids, torch.int64), minlength=self.vocab_size)
        return Penalties(
            in_prompt,
            counts,
            self._tensor([p.repetition_penalty for p in params], torch.float32),
            self._tensor([p.presence_penalty for p in params], torch.float32),
            self._tensor([p.frequency_penalty for p in params], torch.float32),
        )

    def _step_bias(self) -> Tensor | None:
        """The bias, with the end tokens of rows below min_tokens forbidden."""
        early = [row for row, s in enumerate(self.sequences) if s.below_min_tokens and s.request.stop_ids]
        if not early:
            return self.bias
        shape = (len(self.sequences), self.vocab_size)
        bias = torch.zeros(shape, device=self.device) if self.bias is None else self.bias.clone()
        for row in early:
            bias[row, list(self.sequences[row].request.stop_ids)] = -torch.inf
        return bias

    def sample(self, logits: Tensor) -> Tensor:
        """logits [B, V] f32 -> tokens [B] i64, -1 for a row that is not finite."""
        tokens = sample(
            logits,
            self.temperature,
            self.seed,
            self.counter,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            bias=self._step_bias(),
            penalties=self.penalties,
        )
        self.counter += 1
        if self.penalties is not None:
            rows = torch.arange(len(self.sequences), device=self.device)
            self.penalties.counts[rows, tokens.clamp_min(0)] += 1
        return tokens


class Sampler:
    """Next tokens of a batch of sequences. Rows are rebuilt only when the batch changes."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self._rows: Rows | None = None

    def __call__(self, sequences: list[Sequence], logits: Tensor) -> Tensor:
        """logits [B, V] f32 in the order of `sequences`, each of which must accept its token before the next call."""
        if self._rows is None or self._rows.sequences != sequences:
            self._rows = Rows(sequences, self.vocab_size, logits.device)
        return self._rows.sample(logits)

    def forget(self) -> None:
        self._rows = None
