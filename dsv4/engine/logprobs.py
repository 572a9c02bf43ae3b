"""Log-probabilities as requests want them: dicts of candidates per position."""

from __future__ import annotations

from torch import Tensor

from dsv4.engine.output import Logprob, PositionLogprobs
from dsv4.engine.request import Sequence
from dsv4.kernels.token_logprobs.token_logprobs import token_logprobs
from dsv4.text.tokenizer import Tokenizer


class LogprobReader:
    """Reads rows of logits; remembers the text of tokens it has met."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer
        self._texts: dict[int, str | None] = {}

    def read(self, logits: Tensor, tokens: Tensor, tops: list[int]) -> list[PositionLogprobs]:
        """logits [T, V] f32, tokens [T] i64, alternatives each row wants -> per row the token, then the best."""
        chosen, rank, values, ids = (t.tolist() for t in token_logprobs(logits, tokens.to(logits.device), max(tops)))
        positions = []
        for row, (token, top) in enumerate(zip(tokens.tolist(), tops, strict=True)):
            candidates = {token: Logprob(chosen[row], rank[row], self._text(token))}
            for place, (other, value) in enumerate(zip(ids[row][:top], values[row][:top], strict=True), 1):
                candidates.setdefault(other, Logprob(value, place, self._text(other)))
            positions.append(candidates)
        return positions

    def record(self, sequences: list[Sequence], logits: Tensor, tokens: Tensor) -> None:
        """Append the sampled tokens' log-probabilities to the sequences that asked for them."""
        rows = [i for i, s in enumerate(sequences) if s.logprobs is not None]
        if not rows:
            return
        if len(rows) < len(sequences):
            logits, tokens = logits[rows], tokens[rows]
        tops = [sequences[i].params.logprobs or 0 for i in rows]
        read = self.read(logits, tokens.clamp_min(0), tops)
        for i, token, candidates in zip(rows, tokens.tolist(), read, strict=True):
            sequence = sequences[i]
            if token >= 0 and sequence.logprobs is not None and sequence.cumulative_logprob is not None:
                sequence.logprobs.append(candidates)
                sequence.cumulative_logprob += candidates[token].logprob

    def _text(self, token: int) -> str | None:
        if token not in self._texts:
            self._texts[token] = (
                None if self._tokenizer is None else self._tokenizer.decode([token], skip_special=False)
            )
        return self._texts[token]
