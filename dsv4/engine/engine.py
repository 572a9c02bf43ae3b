"""Continuous batching: every step prefills a few chunks and decodes one token of all running sequences."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor

from dsv4.engine.decoder import Decoder
from dsv4.engine.logprobs import LogprobReader
from dsv4.engine.metrics import RunMetrics
from dsv4.engine.output import RequestOutput
from dsv4.engine.params import SamplingParams
from dsv4.engine.request import Request, Sequence
from dsv4.engine.sampler import Sampler
from dsv4.engine.scheduler import Chunk, Limits, Scheduler
from dsv4.engine.text import AnswerText
from dsv4.errors import KernelError, RequestError
from dsv4.kernels.op import twins_on_cuda
from dsv4.model import Model
from dsv4.text.tokenizer import Tokenizer

REQUEST_SEED_STEP = 0xBF58476D1CE4E5B9  # odd: requests without a seed of their own get distinct ones


class Engine:
    """Runs requests of token ids on one model. Not for use from several threads at once.

    `step()` does one step and returns the sequences that moved; `Sequence.take_text()` is the text they have released.
    A sequence whose logits are not finite fails alone (`Sequence.error`); an exception out of a step drops them all.
    """

    def __init__(
        self,
        model: Model,
        limits: Limits,
        *,
        tokenizer: Tokenizer | None = None,
        eos_ids: Iterable[int] = (),
        seed: int = 0,
    ):
        self.model, self.limits, self.tokenizer, self.seed = model, limits, tokenizer, seed
        self.eos_ids = frozenset(eos_ids)
        self.cache = model.new_cache(limits.max_num_seqs, limits.max_total_tokens)
        self.scheduler = Scheduler(limits, self.cache)
        self.sampler = Sampler(model.config.vocab_size)
        self.decoder = Decoder(model, self.cache, limits) if _captured(model) else None
        self.logprobs = LogprobReader(tokenizer)
        self.metrics = RunMetrics()
        self.requests: dict[str, Request] = {}
        self._added = 0

    def add(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        request_id: str | None = None,
    ) -> Request:
        """Queue a request. RequestError, with the numbers, for anything that could never be served."""
        request_id = str(self._added) if request_id is None else request_id
        if request_id in self.requests:
            raise RequestError(f"request id {request_id!r} is in use; every running request needs its own")
        self._check_ids(prompt_ids, params)
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer and this model has none; use stop_token_ids")
        max_tokens = self.scheduler.check(len(prompt_ids), params.max_tokens)
        eos_ids = frozenset() if params.ignore_eos else self.eos_ids
        request = Request(
            request_id,
            prompt,
            prompt_ids,
            params,
            seed=self.seed + self._added * REQUEST_SEED_STEP if params.seed is None else params.seed,
            max_tokens=max_tokens,
            eos_ids=eos_ids,
            stop_ids=eos_ids | frozenset(params.stop_token_ids),
        )
        for sequence in request.sequences:
            if self.tokenizer is not None:
                sequence.text = AnswerText(self.tokenizer, params)
            self.scheduler.add(sequence)
        self.requests[request_id] = request
        self.metrics.requests += 1
        self._added += 1
        return request

    def _check_ids(self, prompt_ids: list[int], params: SamplingParams) -> None:
        vocab = self.model.config.vocab_size
        for where, ids in (
            ("the prompt", prompt_ids),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias),
        ):
            for token in ids:
                if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab:
                    raise RequestError(f"{where} holds {token!r}, which is not a token id in 0..{vocab - 1}")
        for name, count in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
            if count is not None and count > vocab:
                raise RequestError(f"{name} = {count} is more than the vocabulary of {vocab} tokens")

    @property
    def busy(self) -> bool:
        return self.scheduler.unfinished > 0

    def abort(self, request_id: str) -> RequestOutput | None:
        """Stop a request and free what it holds; what it has said so far comes back with finish_reason `abort`."""
        request = self.requests.get(request_id)
        if request is None:
            return None
        for sequence in request.sequences:
            if not sequence.finished:
                sequence.finish_reason = "abort"
                self._finish(sequence)
        return request.output()

    def abort_all(self) -> None:
        for request_id in list(self.requests):
            self.abort(request_id)

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """One step. Sequences that sampled a token, finished ones included; their slots are free already."""
        try:
            decoding = list(self.scheduler.decoding)
            self.scheduler.admit()
            chunks = self.scheduler.chunks()
            moved = self._prefill(chunks) if chunks else []
            return moved + self._decode(decoding) if decoding else moved
        except BaseException:
            self.abort_all()
            raise

    def _prefill(self, chunks: list[Chunk]) -> list[Sequence]:
        start = time.perf_counter()
        together = [c for c in chunks if c.sequence.request.prompt_logprobs is None or c.sequence.index]
        moved = self._prefill_batch(together) if together else []
        for chunk in chunks:
            if chunk not in together:
                moved += self._prefill_with_logprobs(chunk)
        self.metrics.prompt_tokens += sum(c.stop - c.start for c in chunks)
        self.metrics.prefill_seconds += time.perf_counter() - start
        return moved

    def _prefill_batch(self, chunks: list[Chunk]) -> list[Sequence]:
        logits = self.model.forward([c.entry() for c in chunks], self.cache)
        ready = [i for i, c in enumerate(chunks) if self._appended(c)]
        if not ready:
            return []
        rows = logits if len(ready) == len(chunks) else logits[ready]
        return self._sample([chunks[i].sequence for i in ready], rows)

    def _prefill_with_logprobs(self, chunk: Chunk) -> list[Sequence]:
        logits = self.model.forward([chunk.entry()], self.cache, all_logits=True)
        sequence, request = chunk.sequence, chunk.sequence.request
        following = request.prompt_tensor[chunk.start + 1 : chunk.stop + 1]
        top = request.params.prompt_logprobs
        if request.prompt_logprobs is not None and top is not None and len(following):
            read = self.logprobs.read(logits[: len(following)], following, [top] * len(following))
            request.prompt_logprobs.extend(read)
        return self._sample([sequence], logits[-1:]) if self._appended(chunk) else []

    def _appended(self, chunk: Chunk) -> bool:
        """Note that a chunk is in the cache; true when the prompt is complete and its first token can be sampled."""
        chunk.sequence.prefilled = chunk.stop
        if chunk.is_last:
            self.scheduler.prefill_done(chunk.sequence)
        return chunk.is_last

    def _decode(self, sequences: list[Sequence]) -> list[Sequence]:
        start = time.perf_counter()
        if self.decoder is None:
            logits = self.model.forward([s.decode_entry() for s in sequences], self.cache)
            moved = self._sample(sequences, logits)
        else:
            moved = self._accept(sequences, *self.decoder(sequences))
        self.metrics.decode_steps += 1
        self.metrics.decode_tokens += len(sequences)
        self.metrics.decode_seconds += time.perf_counter() - start
        return moved

    def _sample(self, sequences: list[Sequence], logits: Tensor) -> list[Sequence]:
        return self._accept(sequences, self.sampler(sequences, logits).cpu(), logits)

    def _accept(self, sequences: list[Sequence], tokens: Tensor, logits: Tensor) -> list[Sequence]:
        """Give each sequence its token, ids [B] i64 on the CPU; logits [B, V] are what they were sampled from."""
        self.logprobs.record(sequences, logits, tokens)
        for sequence, token, last in zip(sequences, tokens.tolist(), tokens.split(1), strict=True):
            if token < 0:
                sequence.error = _not_finite(sequence, logits[sequences.index(sequence)])
            else:
                sequence.accept(token)
                sequence.next_input = last
                self.metrics.generated_tokens += 1
                if len(sequence.token_ids) == 1 and sequence.request.first_token_time is None:
                    sequence.request.first_token_time = time.monotonic()
            if sequence.finished:
                self._finish(sequence)
        return sequences

    def _finish(self, sequence: Sequence) -> None:
        self.scheduler.drop(sequence)
        request = sequence.request
        if request.finished and self.requests.pop(request.request_id, None) is not None:
            request.finished_time = time.monotonic()
            self.metrics.failed_requests += request.error is not None
            self.sampler.forget()


def _captured(model: Model) -> bool:
    """Whether decode steps are graphs: on a GPU, unless twins take the kernels' place, which wait for the host."""
    return model.device != "cpu" and not twins_on_cuda()


def _not_finite(sequence: Sequence, logits: Tensor) -> KernelError:
    bad = (~logits.isfinite()).nonzero().flatten()
    value = logits[bad[0]].item()
    return KernelError(
        f"{sequence.name}, step {len(sequence.token_ids)} (after {len(sequence.request.prompt_ids)} prompt tokens): "
        f"{len(bad)} of {len(logits)} logits are not finite, the first is {value} for token {bad[0].item()}; the "
        "request was stopped. Check the checkpoint with `dsv4 inspect`, then compare with dtype float32 and act=bf16"
    )
