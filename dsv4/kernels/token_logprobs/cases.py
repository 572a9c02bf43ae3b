"""Cases of token_logprobs."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.case import F32_ULP, Case, Maker, Tolerances
from dsv4.kernels.token_logprobs.token_logprobs import token_logprobs
from dsv4.kernels.token_logprobs.token_logprobs_ref import token_logprobs_ref

ERROR = 8 * F32_ULP  # of the logarithm of the sum: its terms in another order, each with the error of expf


def tolerance(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    """A value is a difference of logits less that logarithm, each rounded. Ranks and ids: as those bounds allow."""
    logits, tokens, _ = args
    logprob, _, values, ids = expected
    bound = lambda x: ERROR + x.double().abs() * 2 * F32_ULP  # noqa: E731
    truth = logits.double().log_softmax(-1)
    chosen = truth.gather(1, tokens[:, None])
    near = (truth - chosen).abs() <= 2 * bound(chosen)
    gaps = values.double().diff(dim=-1).abs() <= 2 * bound(values[:, 1:])
    tied = torch.zeros_like(ids, dtype=torch.bool)
    if ids.shape[1]:
        tied[:, 1:] |= gaps
        tied[:, :-1] |= gaps
        below = truth.topk(min(ids.shape[1] + 1, truth.shape[1])).values[:, ids.shape[1] :]  # the first left out
        tied[:, -1:] |= ((values[:, -1:] - below).abs() <= 2 * bound(below)).any(1, keepdim=True)
    tied |= ~values.isfinite()
    return [bound(logprob), near.sum(-1) - 1.0, bound(values), torch.where(tied, logits.shape[1], 0.0)]


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    sizes = [(3, 7, 0), (3, 7, 7), (2, 4096, 5), (4, 1000, 600), (0, 4096, 5)]
    sizes += [] if quick else [(1, 129280, 0), (1, 129280, 20), (64, 129280, 20), (2, 129281, 1024), (512, 129280, 1)]
    for rows, vocab, top in sizes:
        logits, tokens = make.normal(rows, vocab, scale=4), make.integers(0, vocab, rows)
        tokens[::2] = logits[::2].argmax(-1)
        for name, x in (("", logits), (" ties", logits.round())):
            args = x, tokens, top
            name = f"[{rows}, {vocab}] top {top}{name}"
            yield Case("token_logprobs", name, "f32", token_logprobs, token_logprobs_ref, args, tolerance)
    # Equal values come in the order of their ids; a forbidden token has -inf.
    equal, tokens = torch.zeros(2, 300, device=make.device), make.integers(0, 300, 2)
    equal[:, 100:200] = -torch.inf
    args = equal, tokens, 250
    yield Case("token_logprobs", "equal and -inf", "f32", token_logprobs, token_logprobs_ref, args, tolerance)
