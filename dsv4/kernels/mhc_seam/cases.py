"""Cases of mhc_seam."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.case import DTYPES, EPS, F32_ULP, Case, Maker, Tolerances, rounding
from dsv4.kernels.mhc_pre.tolerances import LARGE, SMALL, mix_error, post_tolerance
from dsv4.kernels.mhc_seam.mhc_seam import mhc_seam
from dsv4.kernels.mhc_seam.mhc_seam_ref import mhc_seam_ref
from dsv4.kernels.mhc_seam.peers import ROWS, Peers, inbox_words

SIZES = [(5, 4096), (2, 7168), (8, 4096), (16, 4096), (33, 4096), (128, 4096)]  # T, D
RANKS = [(1, 256, 0, 2), (3, 100, 1, 2), (35, 64, 2, 4)]  # T, D, rank, ranks
LARGE_RANKS = [
    (1, 4096, 1, 2), (6, 4096, 0, 2), (16, 4096, 0, 2), (64, 4096, 3, 4), (2, 7168, 5, 8), (64, 7168, 0, 2),
    (65, 4096, 1, 2), (128, 4096, 0, 2), (128, 7168, 1, 2),
]  # fmt: skip


def tolerance(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    """mhc_post's for h', then what follows from h'.

    In BF16 an element of h' that lies within float32's error of a rounding boundary may fall on the other side, one
    unit of 2^-8 away. Fewer than 2^-10 of them do; that moves a mix, whose terms are of order (M D)^-1/2, by no more
    than 4 deviations: 4 * 2^-5 * 2^-8. And it moves x there by the weight of that stream.

    The kernel takes the sum of x's squares before x is rounded, as pre^T G pre. In BF16 a square changes by up to
    2 * 2^-8 of itself, by a root mean square of less than 2^-8, and with either sign: the root of the sum of D of them
    by no more than 4 deviations of 2^-9 D^-1/2 (two thirds of what independent normal x give), and never by more than
    2^-8. Each product in pre^T G pre is off by a few ulp; where streams cancel out, their sum is less than they are.
    """
    y, h, post, comb, *_, weight = args
    new, x, new_post, new_comb = expected
    halved = h.dtype == torch.bfloat16
    z = mix_error(h) + (2.0**-11 if halved else 0.0)
    streams = new.double().abs().sum(1)
    pre = _pre(args, new).unsqueeze(-1)
    inner = (new.double() * pre).sum(1)
    scale = (inner.square().mean(-1, keepdim=True) + EPS).rsqrt()
    moved = rounding(inner.to(h.dtype)) + streams * (z / 4 + 4 * F32_ULP + (2.0**-8 if halved else 0.0))
    squares = inner.square().sum(-1, keepdim=True) + x.shape[-1] * EPS
    cancelled = (new.double().abs() * pre).sum(1).square().sum(-1, keepdim=True) * 4 * F32_ULP / squares
    rounded = min(2.0**-8, 4 * 2.0**-9 * x.shape[-1] ** -0.5) if halved else 0.0
    bound = rounding(x) + moved * scale * weight.double().abs() + x.double().abs() * (z + cancelled + rounded)
    # Sinkhorn: each of its 40 steps rounds, here and in the twin
    mixed = torch.full_like(new_comb, z + 80 * 2.0**-24)
    return [*post_tolerance((y, h, post, comb), [new]), bound, torch.full_like(new_post, z + 1e-6), mixed]


def _pre(args: tuple[Any, ...], new: Tensor) -> Tensor:
    fn, base, scale = (arg[:4].double() for arg in args[4:7])
    v = new.double().flatten(1)
    return torch.sigmoid((v @ fn.T) * (v.square().mean(1, keepdim=True) + EPS).rsqrt() * scale + base) + 1e-6


def echo(rank: int, size: int, device: torch.device) -> Peers:
    """Of seams: all ranks give the same part of a sum."""
    return played(rank, size, device, inbox_words(size), lambda y: sum((y for _ in range(size - 1)), start=y))


def played(
    rank: int, size: int, device: torch.device, words: int, total: Callable[[Tensor], Tensor], *, turns: int = ROWS
) -> Peers:
    """One rank that plays all: what it tells a peer arrives in its own inbox, of `words` in two halves, as what that
    peer tells it.
    """
    inbox = torch.zeros(words, dtype=torch.int64, device=device)
    addresses = [inbox.data_ptr() + (peer - rank) * (words // 2 // size) * 8 for peer in range(size)]

    def whole(x: Tensor) -> Tensor:
        assert inbox.is_contiguous()  # and lives as long as the peers
        return total(x)

    return Peers.of(rank, addresses, device, whole, turns=turns)


def of_sum(peers: Peers) -> Callable[[tuple[Any, ...], list[Tensor]], Tolerances]:
    return lambda args, expected: tolerance((peers.total(args[0]).to(args[1].dtype), *args[1:]), expected)


def arguments(make: Maker, rows: int, width: int, dtype: str, part: str) -> tuple[Tensor, ...]:
    y, h = make.normal(rows, width, dtype=part), make.normal(rows, 4, width, dtype=dtype)
    post, comb = make.uniform(rows, 4) * 2, make.uniform(rows, 4, 4) / 2
    fn, base = make.normal(24, 4 * width, scale=(4 * width) ** -0.5), make.normal(24)
    scale = torch.tensor([0.7] * 4 + [1.3] * 4 + [0.9] * 16, device=make.device)
    return y, h, post, comb, fn, base, scale, make.normal(width)


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    how = {"sinkhorn_iters": 20, "hc_eps": 1e-6, "norm_eps": EPS}
    for dtype in DTYPES:
        for rows, width in SMALL if quick else SMALL + SIZES + LARGE:
            args = arguments(make, rows, width, dtype, dtype)
            yield Case("mhc_seam", f"[{rows}, 4, {width}]", dtype, mhc_seam, mhc_seam_ref, args, tolerance, how)
        for rows, width, rank, size in RANKS if quick else RANKS + LARGE_RANKS:
            args, peers = arguments(make, rows, width, dtype, "f32"), echo(rank, size, make.device)
            name, among = f"[{rows}, 4, {width}], rank {rank} of {size}", how | {"peers": peers}
            yield Case("mhc_seam", name, dtype, mhc_seam, mhc_seam_ref, args, of_sum(peers), among)
    # Sums of small whole numbers are exact in any order: h' must be met bit for bit.
    y, h = make.integers(-8, 9, 3, 128).bfloat16(), make.integers(-8, 9, 3, 4, 128).bfloat16()
    post, comb = make.integers(0, 3, 3, 4).float(), make.integers(0, 3, 3, 4, 4).float()
    args = y, h, post, comb, *arguments(make, 3, 128, "bf16", "bf16")[4:]
    yield Case("mhc_seam", "exact streams", "bf16", mhc_seam, mhc_seam_ref, args, exact, how)


def exact(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    return [None, *tolerance(args, expected)[1:]]
