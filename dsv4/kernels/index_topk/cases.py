"""Cases of index_topk: decode of short and long contexts, prefill of several sequences, ties, and all that is hidden.

Queries are small integers and rotations quarter turns, so that every order of the transform's sums gives the same bits.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.case import BF16_ULP, F32_ULP, Case, Maker, Tolerances, bits, nbytes
from dsv4.kernels.index_query.index_query_ref import index_query_ref, index_rounding_ref
from dsv4.kernels.index_topk.index_topk import index_topk
from dsv4.kernels.index_topk.index_topk_ref import index_scores_ref, index_topk_ref
from dsv4.quant.kv import pack_index_key, unpack_index_key

WIDTH, PAGE, ROPE = 128, 64, 64


def inputs(
    make: Maker, heads: int, n_pages: int, sequence: Sequence[int], visible: Sequence[int], *, exact: bool, packed: bool
) -> list[Any]:
    """q, cis, weights, keys, pages, sequence, visible. Pages lie in any order; what no row may see holds NaN.

    `exact`: keys and weights are small integers too, whose products and sums no step rounds differently, with many
    equal scores.
    """
    rows, count = len(sequence), max(sequence, default=0) + 1
    numbers = torch.tensor(sequence, device=make.device, dtype=torch.int64)
    seen = torch.tensor(visible, device=make.device, dtype=torch.int64)
    held = [
        max((-(-v // PAGE) for v, s in zip(visible, sequence, strict=True) if s == b), default=0) for b in range(count)
    ]
    order = 1 + torch.randperm(sum(held), generator=make.generator, device=make.device)
    pages = torch.full((count, n_pages), -1, device=make.device)
    for b, part in enumerate(order.split(held)):
        pages[b, : held[b]] = part
    quarter = torch.tensor([1, 1j, -1, -1j], dtype=torch.complex64, device=make.device)
    cis = quarter[make.integers(0, 4, rows, ROPE // 2)]
    if exact:
        q, keys = make.integers(-1, 2, rows, heads, WIDTH).bfloat16(), make.integers(-2, 3, sum(held) + 1, PAGE, WIDTH)
        keys, weights = keys.bfloat16(), make.integers(-1, 3, rows, heads).bfloat16()
    else:
        q = make.integers(-15, 16, rows, heads, WIDTH).bfloat16()
        keys = torch.cat(
            [
                index_rounding_ref(make.normal(min(4096, sum(held) + 1 - i), PAGE, WIDTH, dtype="bf16", scale=2), True)
                for i in range(0, sum(held) + 1, 4096)
            ]
        )
        weights = make.normal(rows, heads + 7, scale=heads**-0.5)[:, 3 : 3 + heads]  # as a projection's slice comes
    keys[0] = float("nan")
    for b in range(count):
        most = max((v for v, s in zip(visible, sequence, strict=True) if s == b), default=0)
        if most % PAGE:
            keys[pages[b, most // PAGE], most % PAGE :] = float("nan")
    q[numbers < 0] = float("nan")
    return [q, cis, weights, pack_index_key(keys) if packed else keys, pages, numbers, seen]


def scores_of(args: Sequence[Any]) -> Callable[[list[Tensor]], list[Tensor]]:
    """What the twin scores the picked entries with, float32 [T, k] falling, 0 for none: picks may differ among scores
    that rounding cannot tell apart.
    """
    q, cis, weights, keys = args[:4]
    q = index_query_ref(q, cis, quantize=keys.dtype == torch.uint8)

    def view(results: list[Tensor]) -> list[Tensor]:
        picked = results[0]
        scores = torch.zeros(picked.shape, device=q.device)
        for t in range(len(picked)):
            chosen = keys.view(-1, keys.shape[-1])[picked[t].clamp(min=0)]
            chosen = unpack_index_key(chosen, WIDTH) if chosen.dtype == torch.uint8 else chosen
            scores[t] = index_scores_ref(q[t : t + 1], weights[t : t + 1].bfloat16() * WIDTH**-0.5, chosen)[0].float()
        return [scores.masked_fill(picked < 0, 0).sort(dim=-1, descending=True).values]

    return view


def two_scores_off(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    """Dot products of E2M1 numbers are exact; the heads' shares are added in another order, then rounded: a score of
    the kernel and of the twin are one unit in the last place apart, the k-th best of either at most two. Where shares
    cancel, their sum is off by H times F32_ULP of what they add up to without signs, taken as H times the best score.
    """
    y, heads = expected[0].double().abs(), args[0].shape[1]
    return [2 * BF16_ULP * y + heads * heads * F32_ULP * y.amax(-1, keepdim=True)]


def made(name: str, args: list[Any], topk: int, *, exact: bool) -> Case:
    read = int((args[6] * (args[6] > topk)).sum()) * args[3].shape[-1] * args[3].element_size()
    width = min(topk, PAGE * args[4].shape[1])
    return Case(
        "index_topk",
        name,
        "bf16",
        index_topk,
        index_topk_ref,
        (*args, topk, "entry", 1.0 if exact else WIDTH**-0.5),
        bits if exact else two_scores_off,
        {"quantize": args[3].dtype == torch.uint8},
        view=None if exact else scores_of(args),
        moved=read + nbytes(*args[:3]) + 8 * width * len(args[0]),
    )


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    small = [
        ("[0, 64] of 4 pages", 64, 4, [], [], 64),
        ("[1, 64] 300 of 8 pages", 64, 8, [0], [300], 64),
        ("[4, 16] three sequences", 16, 6, [0, 1, -1, 2], [300, 64, 77, 384], 64),
        ("[3, 8] all taken", 8, 3, [0, 1, 2], [0, 64, 190], 512),
        ("[2, 64] none chosen, wide", 64, 40, [0, 1], [512, 3], 512),
        ("[2, 64] 513 and 1024 of 16 pages", 64, 16, [0, 1], [513, 1024], 512),
        ("[1, 64] 2049 of 33 pages", 64, 33, [0], [2049], 512),
        (
            "[17, 8] of others' pages",
            8,
            9,
            [17 - t // 4 for t in range(17)][::-1],
            [65 * (t % 9) for t in range(17)],
            64,
        ),
        ("[2, 8] 600 of 129 pages", 8, 129, [0, 1], [600, 90], 64),
        ("[4, 8] 8193 of 140 pages", 8, 140, [0, 1, -1, 2], [8193, 8960, 77, 513], 512),
        ("[70, 8] chunks", 8, 4, [0] * 37 + [2] * 30 + [-1] * 3, [*range(90, 127), *range(60, 90), 5, 0, 200], 64),
        ("[65, 64] of one sequence", 64, 9, [0] * 65, [*range(510, 575)], 512),
        ("[130, 64] prefill", 64, 9, [0] * 130, [*range(446, 576)], 512),
    ]
    for name, heads, n_pages, sequence, visible, topk in small:
        for packed in (True, False):
            args = inputs(make, heads, n_pages, sequence, visible, exact=True, packed=packed)
            yield made(f"{name}{'' if packed else ' plain'} exact", args, topk, exact=True)
        args = inputs(make, heads, n_pages, sequence, visible, exact=False, packed=True)
        yield made(name, args, topk, exact=False)
    for entries in [700, 9000] + ([] if quick else [262144]):
        alike = inputs(make, 64, -(-entries // PAGE), [0], [entries], exact=True, packed=True)
        alike[2] = torch.zeros_like(alike[2])
        yield made(f"[1, 64] all {entries} scores equal", alike, 512, exact=True)
    unknown = inputs(make, 8, 141, [0], [9000], exact=True, packed=False)
    for entry in (0, 4095, 4096, 8999):
        unknown[3][unknown[4][0, entry // PAGE], entry % PAGE] = float("nan")
    yield made("[1, 8] NaN among 9000 scores", unknown, 64, exact=True)
    if quick:
        return
    for rows, most, topk in [(1, 2048, 512), (1, 16384, 512), (1, 32768, 1024), (4, 16384, 512), (64, 16384, 512)]:
        seen = [most - 5 * t for t in range(rows)]
        for exact in (True, False):
            args = inputs(make, 64, most // PAGE, range(rows), seen, exact=exact, packed=True)
            yield made(f"[{rows}, 64] {most} top {topk}{' exact' if exact else ''}", args, topk, exact=exact)
    for rows, most, n_pages in [
        (1, 2048, 4096),
        (1, 70000, 1094),
        (1, 262144, 4096),
        (9, 262144, 4096),
        (64, 2048, 256),
    ]:
        args = inputs(make, 64, n_pages, range(rows), [most] * rows, exact=True, packed=True)
        yield made(f"[{rows}, 64] {most} of {n_pages} pages exact", args, 512, exact=True)
    for rows, first, topk in [(1024, 0, 512), (1024, 64512, 512), (1024, 7168, 1024), (70, 1048448, 512)]:
        seen = [(first + t + 1) // 4 for t in range(rows)]
        args = inputs(make, 64, -(-seen[-1] // PAGE), [0] * rows, seen, exact=True, packed=True)
        yield made(f"[{rows}, 64] prefill at {first} top {topk} exact", args, topk, exact=True)
