"""Cases of sparse_attention: windows, selections and long lists of V4, holes in them, and sums that are exact."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.case import BF16_ULP, EPS, F32_ULP, Case, Maker, Tolerances, bits, nbytes, pairs
from dsv4.kernels.q_norm_rope.q_norm_rope import q_norm_rope
from dsv4.kernels.sparse_attention.sparse_attention import sparse_attention
from dsv4.kernels.sparse_attention.sparse_attention_ref import LOWEST, sparse_attention_ref
from dsv4.quant.kv import pack_entry, unpack_entry

HEAD_DIM, ROPE, SCALE = 512, 64, 512**-0.5
WINDOW, SLOTS, PAGES = 128, 64, 160  # 160 pages of 64: 10240 entries


def spread(args: tuple[Any, ...], rows: slice) -> Tensor:
    """How far rows of a result may be apart before they are rounded and turned, float32 [t, H, Dh].

    A probability is rounded to BF16, an error of up to u = 2^-8 of itself, by kernel and twin in their own way. With
    a = sum p |v| / total that is 2 u a at most; as errors of many entries have no common sign, 8 standard deviations of
    their sum is the smaller bound where many entries count. A logit is off by 4 sqrt(512) 2^-24 of |q| |k|, as is p.
    """
    q, local, local_rows, pool, pool_rows, sink, _ = args
    sources = [(local, local_rows)] + ([] if pool is None else [(pool, pool_rows)])
    entries, there = [], []
    for buffer, numbers in sources:
        held = buffer.view(-1, buffer.shape[-1])[numbers[rows].clamp(min=0)]
        held = unpack_entry(held, HEAD_DIM, ROPE) if held.dtype == torch.uint8 else held
        entries.append(held.masked_fill((numbers[rows] < 0).unsqueeze(-1), 0).float())
        there.append(numbers[rows] >= 0)
    v, seen = torch.cat(entries, dim=1), torch.cat(there, dim=1).unsqueeze(1)
    heads = q[rows].float()
    logits = (torch.bmm(heads, v.transpose(1, 2)) * SCALE).masked_fill(~seen, float("-inf"))
    top = logits.amax(-1, keepdim=True).clamp(min=LOWEST)
    p = (logits - top).exp()
    p = p / (p.sum(-1, keepdim=True) + (sink.view(1, -1, 1) - top).exp())
    most = torch.bmm(p, v.abs())
    deviation = torch.bmm(p.square(), v.square()).sqrt() * (2 / 3) ** 0.5
    u = BF16_ULP / 2
    norms = heads.norm(dim=-1, keepdim=True) * v.norm(dim=-1).amax(-1).view(-1, 1, 1) * SCALE
    off = 2 * F32_ULP * HEAD_DIM**0.5 * norms + 64 * F32_ULP
    return u * torch.minimum(2 * most, 8 * deviation) + 2 * off * most


def tolerance(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    y = expected[0]
    parts = [spread(args, slice(t, t + 16)) for t in range(0, len(y), 16)]
    off = torch.cat(parts) if parts else torch.zeros_like(y, dtype=torch.float32)
    turned = off[..., -ROPE:].unflatten(-1, (-1, 2)).sum(-1, keepdim=True).expand(*y.shape[:-1], -1, 2).flatten(-2)
    rounding = torch.cat([y[..., :-ROPE].double().abs(), 2 * pairs(y[..., -ROPE:])], dim=-1) * BF16_ULP
    return [torch.cat([off[..., :-ROPE], turned], dim=-1) + rounding]


def inputs(
    make: Maker, rows: int, heads: int, window: int, selected: int, *, packed: tuple[bool, bool], scale: float = 1.0
) -> list[Any]:
    """Each row has a slot of the ring, and entries of the pool in rising order. Row 0 of both, unused, holds NaN."""
    local = make.normal(SLOTS, WINDOW, HEAD_DIM, dtype="bf16")
    pool = make.normal(PAGES, 64, HEAD_DIM, dtype="bf16", scale=2)
    local[0, 0], pool[0, 0] = float("nan"), float("nan")
    slots = 1 + torch.arange(rows, device=make.device) % (SLOTS - 1)
    local_rows = slots.unsqueeze(1) * WINDOW + torch.arange(window, device=make.device)
    chosen = make.uniform(rows, PAGES * 64 - 1).topk(selected, dim=-1).indices.sort(dim=-1).values + 1
    return [
        make.normal(rows, heads, HEAD_DIM, dtype="bf16", scale=scale),
        pack_entry(local, ROPE) if packed[0] else local,
        local_rows,
        (pack_entry(pool, ROPE) if packed[1] else pool) if selected else None,
        chosen if selected else None,
        make.normal(heads, scale=3),
        make.cis(rows, ROPE),
    ]


def made(name: str, args: list[Any], compare: Any = tolerance) -> Case:
    read = sum(
        int((numbers >= 0).sum()) * buffer.shape[-1] * buffer.element_size()
        for buffer, numbers in ((args[1], args[2]), (args[3], args[4]))
        if buffer is not None
    )
    moved = read + nbytes(*(x for x in (args[2], args[4]) if x is not None), args[0], args[0])
    return Case(
        "sparse_attention",
        name,
        "bf16",
        sparse_attention,
        sparse_attention_ref,
        tuple(args),
        compare,
        {"scale": SCALE},
        moved=moved,
    )


def quarter_turns(make: Maker, rows: int) -> Tensor:
    """1, i, -1 and -i: rotations that round nothing."""
    turns = make.integers(0, 4, rows, ROPE // 2)
    return torch.tensor([1, 1j, -1, -1j], dtype=torch.complex64, device=make.device)[turns]


def exact(make: Maker, rows: int, heads: int, window: int, selected: int) -> Iterator[Case]:
    """Probabilities that are all 1, or 1 for one entry: every entry must be where it belongs, to the bit."""
    both = f"[{rows}, {heads}] {window} + {selected}"
    args = inputs(make, rows, heads, window, selected, packed=(True, True))
    signs = 2.0 * make.integers(0, 2, PAGES, 64, HEAD_DIM) - 1
    args[1] = pack_entry(2.0 * make.integers(0, 2, SLOTS, WINDOW, HEAD_DIM) - 1, ROPE)
    args[3], args[6] = pack_entry(signs, ROPE), quarter_turns(make, rows)
    args[5] = torch.full_like(args[5], -1e5)
    one = list(args)
    args[0] = torch.zeros_like(args[0])
    yield made(f"{both} equal", args, bits)
    place = make.integers(0, selected, rows, heads)
    one[0] = 8 * signs.view(-1, HEAD_DIM)[args[4].gather(1, place)].bfloat16()
    yield made(f"{both} one each", one, bits)


def apart(*args: Any, turn: Tensor, eps: float, **how: Any) -> Tensor:
    return sparse_attention(q_norm_rope(args[0], turn, eps), *args[1:], **how)


def turned(make: Maker, rows: int, heads: int, window: int, selected: int) -> Case:
    """Queries as the projection leaves them: bit for bit what q_norm_rope and the attention of its result give."""
    args = tuple(inputs(make, rows, heads, window, selected, packed=(True, True)))
    how = {"scale": SCALE, "turn": make.cis(rows, ROPE), "eps": EPS}
    name = f"[{rows}, {heads}] {window} + {selected} turned"
    return Case("sparse_attention", name, "bf16", sparse_attention, apart, args, bits, how, moved=nbytes(args[0]) * 2)


def one_by_one(*args: Any, **how: Any) -> Tensor:
    q, local, local_rows, pool, pool_rows, sink, cis = args
    each = [slice(t, t + 1) for t in range(len(q))]
    rows = [(q[t], local, local_rows[t], pool, pool_rows[t], sink, cis[t]) for t in each]
    return torch.cat([sparse_attention(*row, **how) for row in rows])


def alike(make: Maker, rows: int, heads: int, window: int, selected: int) -> Case:
    """Rows of a decode step have the bits that each has alone."""
    args = inputs(make, rows, heads, window, selected, packed=(True, True))
    args[4][make.uniform(rows, selected) < 0.3], args[4][0], args[2][1], args[4][1] = -1, -1, -1, -1
    args[4][-1, selected // 2 :] = -1
    name = f"[{rows}, {heads}] {window} + {selected} row by row"
    how = {"scale": SCALE}
    return Case("sparse_attention", name, "bf16", sparse_attention, one_by_one, tuple(args), bits, how)


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    packed = True, True
    for rows, heads in ((1, 64), (3, 4), (5, 128), (20, 32), (66, 64), (67, 20), (66, 32)):
        yield turned(make, rows, heads, 128, 100)
    for rows, heads, selected in ((9, 32, 100), (17, 20, 100), (13, 16, 520), (12, 64, 530), (4, 32, 1200)):
        yield alike(make, rows, heads, 128, selected)
    yield made("[0, 64]", inputs(make, 0, 64, 128, 64, packed=packed))
    for rows, heads, window, selected, form in [
        (1, 64, 128, 40, packed),
        (2, 4, 100, 0, packed),
        (3, 4, 7, 64, (False, False)),
        (1, 128, 128, 1, (False, True)),
        (66, 4, 128, 64, (False, True)),
        (65, 64, 1, 20, packed),
    ]:
        name = f"[{rows}, {heads}] {window} + {selected}{'' if form == packed else ' plain'}"
        yield made(name, inputs(make, rows, heads, window, selected, packed=form))
    holes = inputs(make, 5, 64, 128, 200, packed=packed)
    holes[2][make.uniform(5, 128) < 0.5], holes[4][make.uniform(5, 200) < 0.5] = -1, -1
    holes[4][:, 48:170], holes[2][1], holes[4][1], holes[2][2] = -1, -1, -1, -1
    yield made("[5, 64] holes, one row with nothing", holes)
    yield from exact(make, 2, 64, 128, 100)
    yield from exact(make, 66, 4, 128, 100)
    yield made("[2, 64] logits of 1000", inputs(make, 2, 64, 128, 100, packed=packed, scale=300))
    if quick:
        return
    for rows, heads, selected in ((9, 32, 4000), (2, 64, 8192)):
        yield alike(make, rows, heads, 128, selected)
    for rows in (1, 4, 16, 64):
        for window, selected in [(128, 0), (128, 32), (128, 512), (128, 8192)]:
            yield made(f"[{rows}, 64] {window} + {selected}", inputs(make, rows, 64, window, selected, packed=packed))
    for rows in (1, 4):
        yield made(f"[{rows}, 128] 128 + 1024", inputs(make, rows, 128, 128, 1024, packed=packed))
    captured = inputs(make, 1, 64, 128, 8192, packed=packed)
    captured[4][:, 32:] = -1
    yield made("[1, 64] 128 + 32 of 8192", captured)
    yield from exact(make, 1, 64, 128, 512)
    yield from exact(make, 100, 64, 128, 512)
    yield made("[1024, 64] 128 + 512", inputs(make, 1024, 64, 128, 512, packed=(False, True)))
    yield made("[1024, 64] 128 + 32", inputs(make, 1024, 64, 128, 32, packed=packed))
    yield made("[256, 128] 128 + 1024", inputs(make, 256, 128, 128, 1024, packed=(False, True)))
