"""How well a model predicts a text: nats per token, perplexity, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsv4.errors import KernelError, RequestError
from dsv4.model import Model
from dsv4.text.tokenizer import Tokenizer

CHUNK = 256  # rows of logits held at once


@dataclass(frozen=True)
class Score:
    """Sums over scored tokens; adding two scores pools their texts."""

    nats: float = 0.0
    tokens: int = 0
    text_bytes: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.text_bytes + other.text_bytes)

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, unlike the other two."""
        return self.nats / math.log(2) / self.text_bytes

    def document(self) -> dict[str, float]:
        return {
            "tokens": self.tokens,
            "bytes": self.text_bytes,
            "nats_per_token": self.nats_per_token,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
        }


def windows(total: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, first, end) per window over ids 0..total-1: the model sees begin..end-2 and is scored on first..end-1.

    Every id but the first is scored exactly once, with at least context - stride + 1 ids before it where there are so
    many, and never more than `context`.
    """
    if not 1 <= stride <= context:
        raise RequestError(f"stride must be between 1 and context = {context}, got {stride}")
    starts = range(1, total, stride)
    return [(max(0, min(s + stride, total) - 1 - context), s, min(s + stride, total)) for s in starts]


@torch.inference_mode()
def negative_log_likelihood(
    model: Model, ids: list[int], *, context: int, stride: int, advance: Callable[[], None] = lambda: None
) -> float:
    """Sum in nats of -log p(ids[i] | what its window shows of ids[:i]), i = 1..N-1. `advance` is called per window."""
    tokens, total = torch.tensor(ids), 0.0
    for begin, first, end in windows(len(ids), context, stride):
        cache = model.new_cache(1, end - 1 - begin)
        slot = cache.acquire()
        for chunk in tokens[begin : first - 1].split(CHUNK):
            if len(chunk):
                model.forward([(slot, chunk)], cache)
        for chunk, targets in zip(
            tokens[first - 1 : end - 1].split(CHUNK), tokens[first:end].split(CHUNK), strict=True
        ):
            logits = model.forward([(slot, chunk)], cache, all_logits=True)
            total += torch.nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="sum").item()
        if not math.isfinite(total):
            raise KernelError(f"the loss is not finite in the window of tokens {begin}..{end - 1}; try act=bf16")
        advance()
    return total


def encode_text(tokenizer: Tokenizer, text: str, limit: int | None, *, control: bool = False) -> tuple[list[int], int]:
    """Ids of a text behind BOS, at most `limit` scored ones, and the bytes that the scored ones stand for.

    control: control tokens spelled in the text (chat transcripts) are meant as such; else they are ordinary characters.
    """
    ids = tokenizer.encode(text, add_bos=True, control=control)
    ids = ids if limit is None else ids[: limit + 1]
    if len(ids) < 2:
        raise RequestError("there is no text to score")
    return ids, len(tokenizer.decode_bytes(ids[1:], skip_special=False))
