"""Twin of sample, and the counter-based noise it is defined by."""

from typing import NamedTuple

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # the odd constants of SplitMix64 as signed 64-bit integers (products wrap)
MIX1 = 0xBF58476D1CE4E5B9 - 2**64
MIX2 = 0x94D049BB133111EB - 2**64
FEW = 256  # candidates that nearly always hold the mass of top_p, so that the vocabulary need not be sorted


class Penalties(NamedTuple):
    """What rows have said so far and how much that counts. A row without penalties has factors 1, 0, 0."""

    in_prompt: Tensor
    """[B, V] bool: the token occurs in the prompt."""
    counts: Tensor
    """[B, V] i32: how often the token was generated."""
    repetition: Tensor
    """[B] f32: divides positive and multiplies negative logits of tokens seen in prompt or output."""
    presence: Tensor
    """[B] f32: subtracted once from generated tokens."""
    frequency: Tensor
    """[B] f32: subtracted per generated occurrence."""


class Forbidden(NamedTuple):
    """Tokens that a row must not give while its counter is low: the stop ids below min_tokens."""

    ids: Tensor
    """[B, N] i64; -1 is no token."""
    until: Tensor
    """[B] i64: the row's ids are forbidden while counter < until."""


def splitmix(z: Tensor) -> Tensor:
    """The output function of SplitMix64 on int64 [...]; right shifts are logical."""
    z = (z >> 30).bitwise_and_(2**34 - 1).bitwise_xor_(z).mul_(MIX1)
    z = (z >> 27).bitwise_and_(2**37 - 1).bitwise_xor_(z).mul_(MIX2)
    return (z >> 31).bitwise_and_(2**33 - 1).bitwise_xor_(z)


def uniform_ref(seed: Tensor, counter: Tensor, vocab: int) -> Tensor:
    """Noise u [B, V] f32 in (0, 1 - 2^-24] of rows seed, counter [B] i64: a pure function of (seed, counter, token)."""
    key = splitmix(splitmix(seed + GOLDEN) + (counter + 1) * GOLDEN)
    steps = torch.arange(1, vocab + 1, device=seed.device).mul_(GOLDEN)
    high = (splitmix(key[:, None] + steps) >> 32).bitwise_and_(2**32 - 1)
    return high.float().add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)


def penalize_ref(logits: Tensor, p: Penalties) -> Tensor:
    """logits [B, V] f32 -> new logits: repetition first, then frequency and presence."""
    generated = p.counts > 0
    factor = torch.where(generated | p.in_prompt, p.repetition[:, None], 1.0)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    return logits - p.frequency[:, None] * p.counts - p.presence[:, None] * generated


def forbid_ref(logits: Tensor, counter: Tensor, forbidden: Forbidden) -> Tensor:
    """logits [B, V] f32 -> new logits with -inf at each early row's ids."""
    ids = forbidden.ids.masked_fill((counter >= forbidden.until)[:, None], -1)
    rows, places = (ids >= 0).nonzero(as_tuple=True)
    return logits.index_put((rows, ids[rows, places]), logits.new_tensor(-torch.inf))


def threshold_ref(scores: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None) -> Tensor:
    """[B, 1] f32: the lowest score that stays, of scores [B, V] f32 whose largest is 0 in every row."""
    lowest = scores.new_full((len(scores), 1), -torch.inf) if min_p is None else min_p.log()[:, None]
    vocab = scores.shape[-1]
    if top_k is not None:
        values = scores.topk(min(max(int(top_k.max()), 1), vocab)).values
        kth = values.gather(1, top_k.clamp(1, vocab)[:, None] - 1)
        kth = torch.where(top_k[:, None] > 0, kth, -torch.inf)
        scores = scores.masked_fill(scores < kth, -torch.inf)
        lowest = torch.maximum(lowest, kth)
    if top_p is not None:
        total = scores.exp().sum(-1, keepdim=True)
        for candidates in (min(FEW, vocab), vocab):
            values = scores.topk(candidates).values
            mass = values.exp().div_(total).cumsum_(-1)
            if candidates == vocab or (mass[:, -1] >= top_p).logical_or_(top_p >= 1).all():
                break
        last = (mass < top_p[:, None]).sum(-1, keepdim=True).clamp_(max=candidates - 1)
        # rounding may leave the sum of all below 1: top_p = 1 means off
        lowest = torch.maximum(lowest, values.gather(1, last).masked_fill_(top_p[:, None] >= 1, -torch.inf))
    return lowest


def sample_ref(
    logits: Tensor,
    temperature: Tensor,
    seed: Tensor,
    counter: Tensor,
    *,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    bias: Tensor | None = None,
    biased: Tensor | None = None,
    forbidden: Forbidden | None = None,
    penalties: Penalties | None = None,
) -> Tensor:
    finite = (logits.amax(-1) - logits.amin(-1)) < torch.inf
    if bias is not None:
        logits = logits + (bias if biased is None else bias.masked_fill(~biased[:, None], 0))
    if forbidden is not None:
        logits = forbid_ref(logits, counter, forbidden)
    if penalties is not None:
        logits = penalize_ref(logits, penalties)
    drawn = temperature > 0
    if drawn.any():
        scores = logits - logits.amax(-1, keepdim=True)
        scores = scores / torch.where(drawn, temperature, 1.0)[:, None]
        if not (top_k is None and top_p is None and min_p is None):
            scores = scores.masked_fill(scores < threshold_ref(scores, top_k, top_p, min_p), -torch.inf)
        arrival = -torch.log1p(-uniform_ref(seed, counter, logits.shape[-1]))
        logits = torch.where(drawn[:, None], scores - arrival.log(), logits)
    return torch.where(finite, logits.argmax(-1), -1)
