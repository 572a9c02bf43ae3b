"""The sampler's front: parameters of requests as rows of tensors, kept from step to step while the batch stays."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Ids
from typing import Any

import torch
from torch import Tensor

from dsv4.engine.params import SamplingParams
from dsv4.engine.request import Sequence
from dsv4.errors import RequestError
from dsv4.kernels.advance.advance import advance
from dsv4.kernels.sample.sample import Forbidden, Penalties, sample


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


class SamplerBuffers:
    """Sampling parameters of R rows in tensors that stay where they are, for a step that is captured in a graph.

    `set` and `clear` note a row's change, `upload` sends all changes: asynchronous copies from pinned memory and a few
    launches, between steps, on the current stream. In the step, `sample` and `advance` need nothing of the host. A row
    that was never set is greedy. Holds R * V * 9 bytes for bias and penalties, read only for rows that have them.
    """

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device | str, *, max_stops: int = 64):
        self.vocab_size, self.device, self.max_stops = vocab_size, torch.device(device), max_stops

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self._integers = zeros(4, max_rows, dtype=torch.int64)
        self._numbers = zeros(6, max_rows, dtype=torch.float32)
        self.seed, self.counter, self.top_k, self.until = self._integers
        self.temperature, self.top_p, self.min_p, self.repetition, self.presence, self.frequency = self._numbers
        self.top_p.fill_(1)
        self.repetition.fill_(1)
        self.biased = zeros(max_rows, dtype=torch.bool)
        self.stops = zeros(max_rows, max_stops, dtype=torch.int64)
        self.bias = zeros(max_rows, vocab_size, dtype=torch.float32)
        self.in_prompt = zeros(max_rows, vocab_size, dtype=torch.bool)
        self.counts = zeros(max_rows, vocab_size, dtype=torch.int32)
        self._changed: dict[int, tuple[list[int], list[float]]] = {}

    def set(
        self,
        row: int,
        params: SamplingParams,
        *,
        seed: int,
        stop_ids: Collection[int] = (),
        prompt_ids: Ids[int] = (),
        token_ids: Ids[int] = (),
    ) -> None:
        """Give `row` to a sequence that has generated `token_ids` so far; `seed` as a signed 64-bit integer."""
        held = list(stop_ids) if len(token_ids) < params.min_tokens else []
        if len(held) > self.max_stops:
            raise RequestError(f"min_tokens can hold back {self.max_stops} stop tokens, the request has {len(held)}")
        stops = held + [-1] * (self.max_stops - len(held))
        penalties = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        self._changed[row] = (
            [row, seed, len(token_ids), params.top_k, params.min_tokens, *stops],
            [params.temperature, params.top_p, params.min_p, *penalties, float(bool(params.logit_bias))],
        )
        if params.logit_bias:
            ids, amounts = params.logit_bias.keys(), params.logit_bias.values()
            self.bias[row].zero_().index_copy_(0, self._sent(list(ids)), self._sent(list(amounts), torch.float32))
        if params.has_penalties:
            generated = self._sent(list(token_ids))
            self.in_prompt[row].zero_().index_fill_(0, self._sent(list(prompt_ids)), True)
            self.counts[row].zero_().index_add_(0, generated, torch.ones_like(generated, dtype=torch.int32))

    def take(self, row: int, sequence: Sequence) -> None:
        """`set` from a running sequence."""
        request = sequence.request
        self.set(
            row,
            sequence.params,
            seed=sequence.seed,
            stop_ids=request.stop_ids,
            prompt_ids=request.prompt_ids,
            token_ids=sequence.token_ids,
        )

    def clear(self, row: int) -> None:
        """Make `row` greedy without rules, as before it was set."""
        self.set(row, _GREEDY, seed=0)

    def upload(self) -> None:
        """Send the rows that changed. Counters of the others stay as the steps left them."""
        if not self._changed:
            return
        integers = self._sent([x for x, _ in self._changed.values()])
        numbers = self._sent([x for _, x in self._changed.values()], torch.float32)
        self._changed.clear()
        rows = integers[:, 0]
        self._integers.index_copy_(1, rows, integers[:, 1:5].T)
        self.stops.index_copy_(0, rows, integers[:, 5:])
        self._numbers.index_copy_(1, rows, numbers[:, :6].T)
        self.biased.index_copy_(0, rows, numbers[:, 6] > 0)

    def _sent(self, values: list[Any], dtype: torch.dtype = torch.int64) -> Tensor:
        """On a GPU by way of pinned memory, which torch keeps until the copy is done."""
        here = torch.tensor(values, dtype=dtype)
        return here if self.device.type == "cpu" else here.pin_memory().to(self.device, non_blocking=True)

    def sample(self, logits: Tensor, *, out: Tensor | None = None) -> Tensor:
        """logits [B, V] f32 of the first B <= R rows -> tokens [B] i64, -1 for a row that is not finite."""
        n = len(logits)
        return sample(
            logits,
            self.temperature[:n],
            self.seed[:n],
            self.counter[:n],
            top_k=self.top_k[:n],
            top_p=self.top_p[:n],
            min_p=self.min_p[:n],
            bias=self.bias[:n],
            biased=self.biased[:n],
            forbidden=Forbidden(self.stops[:n], self.until[:n]),
            penalties=Penalties(
                self.in_prompt[:n], self.counts[:n], self.repetition[:n], self.presence[:n], self.frequency[:n]
            ),
            out=out,
        )

    def advance(
        self, tokens: Tensor, slots: Tensor, inputs: Tensor, positions: Tensor, ring: Tensor, step: Tensor
    ) -> None:
        """After `sample`, in the same step: tokens, slots, inputs, positions [B] i64, ring [L, C >= B], step [1]; see
        kernels/advance. Counters and token counts move on with the rest.
        """
        n = len(tokens)
        advance(tokens, slots, inputs, positions, self.counter[:n], self.counts[:n], ring, step)


_GREEDY = SamplingParams(temperature=0.0)
