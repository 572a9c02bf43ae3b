"""Cases of sample: a token is a token. Ids differ only where the two best of a row are within the error of logf, about
once in 10^6 rows, or where a mass is that near to top_p.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.case import Case, Maker, bits
from dsv4.kernels.sample.sample import Forbidden, Penalties, sample
from dsv4.kernels.sample.sample_ref import sample_ref

VOCAB = 129280  # V4's


def case(name: str, logits: Tensor, temperature: Tensor, moved: int | None = None, **how: Any) -> Case:
    rows = torch.arange(len(logits), device=logits.device)
    args = logits, temperature, rows * 7919 - 3, rows // 2 + 5
    return Case("sample", f"{list(logits.shape)} {name}", "f32", sample, sample_ref, args, bits, how, moved=moved)


def cycle(values: list[float], rows: int, like: Tensor) -> Tensor:
    """The values over and over, one per row, in the dtype and on the device of `like`."""
    return torch.tensor((values * rows)[:rows], dtype=like.dtype, device=like.device)


def penalties(make: Maker, rows: int, vocab: int, used: bool) -> Penalties:
    counts = make.integers(-6, 4, rows, vocab).clamp_min(0).int()
    on = cycle([1.0, 0.0, 1.0], rows, make.uniform(1)) * used
    return Penalties(make.uniform(rows, vocab) < 0.1, counts, 1 + 0.7 * on, 0.3 * on, 0.2 * on)


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    long, number = make.integers(0, 1, 1), make.uniform(1)
    for rows, vocab in [(1, 1), (5, 7), (3, 4096), (0, 4096)] + (
        [] if quick else [(1, VOCAB), (64, VOCAB), (6, VOCAB + 1)]
    ):
        logits = make.normal(rows, vocab, scale=4)
        zeros, ones = logits.new_zeros(rows), logits.new_ones(rows)
        mixed = cycle([0.0, 0.7, 1.0, 1.9], rows, number)
        k, p = cycle([0, 1, 50, 3, 1000, vocab], rows, long), cycle([1.0, 0.5, 0.99, 0.9, 0.05], rows, number)
        m, bytes_read = cycle([0.0, 0.0, 0.02, 0.5, 1.0], rows, number), rows * vocab * 4
        yield case("greedy", logits, zeros)
        yield case("drawn", logits, ones)
        yield case("greedy or drawn", logits, mixed)
        yield case("top-k", logits, ones, top_k=k)
        yield case("top-p", logits, ones, top_p=p)
        yield case("min-p", logits, mixed, min_p=m)
        yield case("all filters", logits, cycle([0.5, 1.0, 1.9], rows, number), top_k=k, top_p=p, min_p=m)
        yield case("flat", logits * 0.002, ones, top_k=cycle([2, 3, 5], rows, long))
        yield case("flat top-p", logits * 0.002, ones, top_p=p * 0.001)
        yield case("ties", logits.round(), mixed, top_k=k, top_p=p)
        yield case("equal", zeros[:, None].expand(rows, vocab).contiguous(), mixed, top_k=k, top_p=p)
        off: dict[str, Any] = {"top_k": torch.zeros_like(k), "top_p": ones, "min_p": zeros}
        rules: dict[str, Any] = {
            "bias": make.normal(rows, vocab, scale=3),
            "biased": cycle([1, 0, 1], rows, long).bool(),
            "forbidden": Forbidden(make.integers(-1, vocab, rows, 5), cycle([0, 6, 9], rows, long)),
        }
        none = {"biased": torch.zeros_like(k).bool(), "forbidden": Forbidden(rules["forbidden"].ids, k * 0)}
        quiet = rules | none | {"penalties": penalties(make, rows, vocab, False)}
        yield case("greedy, every tensor given, all off", logits, zeros, bytes_read, **off, **quiet)
        yield case("rules", logits, mixed, **rules, penalties=penalties(make, rows, vocab, True))
        yield case(
            "rules and filters", logits, ones, top_k=k, top_p=p, **rules, penalties=penalties(make, rows, vocab, True)
        )
    wide = make.normal(4, 300)[:, 7:263]
    yield case("of [4, 300]", wide, cycle([0.0, 1.0], 4, number), top_k=cycle([9], 4, long))
    bad = make.normal(8, 1000)
    for row, (place, value) in enumerate([(0, torch.nan), (999, torch.inf), (500, -torch.inf), (130, torch.nan)]):
        bad[2 * row, place] = value
    bad[1, 3], bad[1, 4] = 3e38, -3e38  # finite, but not their difference
    yield case("not finite", bad, cycle([0.0, 1.0, 1.0, 0.0], 8, number))
    bias = torch.zeros_like(bad)
    bias[:, 17:] = -torch.inf
    yield case(
        "all but 17 forbidden",
        make.normal(8, 1000),
        cycle([0.0, 1.0], 8, number),
        bias=bias,
        top_k=cycle([20], 8, long),
    )
    yield case(
        "all forbidden", make.normal(2, 1000), cycle([0.0, 1.0], 2, number), bias=torch.full_like(bias[:2], -torch.inf)
    )
