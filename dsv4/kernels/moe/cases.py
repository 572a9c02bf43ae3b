"""Cases of moe. Its two projections are checked one by one, where every rounding is known, then together: there the
twin goes on from the kernel's own first half, whose bits the quantisation of the second depends on.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.case import BF16_ULP, Case, Maker, Tolerances, nbytes, rounding
from dsv4.kernels.moe import launch
from dsv4.kernels.moe.moe import moe
from dsv4.kernels.moe.moe_ref import Order, down_ref, gate_up_ref, order_of
from dsv4.kernels.moe.operand import ExpertsOperand, arrivals_on
from dsv4.kernels.moe.tiled import TiledExperts
from dsv4.kernels.tiles import NVFP4_BYTES, tiles_shape
from dsv4.quant.activations import Treatment, treat

LIMIT = 10.0
SLACK = 2.0**-20  #: of the sum of magnitudes: float32 sums of up to 7168 products in another order


@dataclass(frozen=True)
class Size:
    """A model's E, D, F, K; `tokens` a case may have, small ones first."""

    name: str
    experts: int
    width: int
    inner: int
    topk: int
    tokens: tuple[int, ...]


QUICK = (
    Size("nano", 8, 256, 128, 2, (1, 3, 9, 130)),
    Size("ragged", 5, 80, 48, 3, (2, 20, 131)),
    Size("few tiles", 4, 640, 64, 3, (1, 20)),
)
FLASH = Size("Flash", 256, 4096, 2048, 6, (1, 2, 7, 8, 9, 64, 128, 200, 512, 1024, 4096))
FULL = (
    Size("Flash of two GPUs, 32 experts", 32, 4096, 1024, 6, (1, 2, 8, 20, 128)),
    Size("Flash of four GPUs, 32 experts", 32, 4096, 512, 6, (1, 3, 20)),
    FLASH,
    Size("Pro, 16 experts", 16, 7168, 3072, 6, (1, 2, 8, 64, 200)),
)


def tiled(make: Maker, experts: int, rows: int, columns: int, parts: int, *, every_scale: bool) -> TiledExperts:
    """Random bytes: all codes, and scales of 0.5 to 2, or all of E4M3 from 0 to 448. Beyond the columns: zeros."""
    shape = experts, *tiles_shape(rows * parts, columns, NVFP4_BYTES)
    tiles = torch.empty(shape, dtype=torch.uint8, device=make.device).random_(0, 256, generator=make.generator)
    low, high = (0, 0x7F) if every_scale else (0x30, 0x40)
    tiles[..., 512:].random_(low, high, generator=make.generator)
    if columns % 64:  # lane (g, t) holds the columns 16 t .. 16 t + 15 of the last block
        beyond = torch.arange(32, device=make.device) % 4 >= columns % 64 // 16
        last = tiles[:, :, -1]
        last[..., :512].unflatten(-1, (32, 16))[..., beyond, :] = 0
        last[..., 512:].unflatten(-1, (32, 2))[..., beyond, :] = 0
    size = 120.0 if every_scale else 2.8  # about the root mean square of code x scale
    alpha = (make.uniform(experts, parts) + 0.5) * 2.0 / (size * columns**0.5)
    return TiledExperts(tiles, alpha, columns)


def operand_of(make: Maker, size: Size, *, every_scale: bool = False) -> ExpertsOperand:
    first = tiled(make, size.experts, size.inner, size.width, 2, every_scale=every_scale)
    second = tiled(make, size.experts, size.width, size.inner, 1, every_scale=every_scale)
    size_of, arrivals = nbytes(first.tiles, second.tiles), arrivals_on(make.device)
    return ExpertsOperand(None, "none", "none", first, second, size_of, arrivals)


def routed(make: Maker, size: Size, tokens: int) -> Tensor:
    return torch.rand(tokens, size.experts, generator=make.generator, device=make.device).topk(size.topk).indices


def stepped(make: Maker, size: Size) -> Tensor:
    """One expert a token, and 16 e + 9 tokens for expert e: every width of the products of many tokens."""
    experts = torch.arange(size.experts, device=make.device)
    return experts.repeat_interleave(16 * experts + 9).unsqueeze(-1)


def run_first(x: Tensor, operand: ExpertsOperand, ids: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
    if not x.is_cuda:
        mid = gate_up_ref(x, operand, order_of(ids, operand.held), weights, LIMIT)
        return mid if out is None else out.copy_(mid)
    work = launch.work_of(operand, ids, weights, LIMIT)
    return launch.gate_up(work, *launch.treated(x, operand.in_treatment), out)


def twin_first(x: Tensor, operand: ExpertsOperand, ids: Tensor, weights: Tensor) -> Tensor:
    return gate_up_ref(x, operand, order_of(ids, operand.held), weights, LIMIT)


def first_tolerance(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    """Gate and up may round to the neighbour, and so may the result."""
    x, operand, ids, weights = args
    order = order_of(ids, operand.held)
    rows = treat(x, operand.in_treatment).index_select(0, order.tokens)
    sums = magnitude_sums(rows, operand.w13, order).mul_(SLACK).chunk(2, dim=-1)
    values = signed_sums(rows, operand.w13, order).chunk(2, dim=-1)
    gate_error, up_error = (slack + BF16_ULP * value.abs() for slack, value in zip(sums, values, strict=True))
    gate, up = values[0].clamp(max=LIMIT), values[1].clamp(-LIMIT, LIMIT)
    weight = weights.flatten()[order.pairs].abs().unsqueeze(-1)
    change = 1.1 * gate_error * (up.abs() + up_error) + up_error * gate.sigmoid() * gate.abs()
    return [(change * weight + 2.0**-126).double() + rounding(expected[0]) + change.isnan().double()]


def run_second(mid: Tensor, operand: ExpertsOperand, ids: Tensor, shared: Tensor, out: Tensor | None = None) -> Tensor:
    if not mid.is_cuda:
        result = down_ref(mid, operand, order_of(ids, operand.held), shared)
        return result if out is None else out.copy_(result)
    work = launch.work_of(operand, ids, torch.ones_like(ids, dtype=torch.float32), LIMIT)
    launch.make_plan(work)
    return launch.down(work, *launch.treated(mid, operand.mid_treatment), shared, out)


def twin_second(mid: Tensor, operand: ExpertsOperand, ids: Tensor, shared: Tensor) -> Tensor:
    return down_ref(mid, operand, order_of(ids, operand.held), shared)


def second_tolerance(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    """Every expert's output may round to the neighbour; their sum is float32 and rounded once."""
    mid, operand, ids, shared = args
    return [down_error(mid, operand, order_of(ids, operand.held), shared) + rounding(expected[0])]


def down_error(mid: Tensor, operand: ExpertsOperand, order: Order, shared: Tensor) -> Tensor:
    rows = treat(mid[: len(order.pairs)], operand.mid_treatment)
    one = magnitude_sums(rows, operand.down, order) * SLACK
    values = signed_sums(rows, operand.down, order).abs()
    error = (one + values * (BF16_ULP + 2.0**-20)).nan_to_num(nan=0.0)
    return torch.zeros_like(shared, dtype=torch.float32).index_add_(0, order.tokens, error).double() + 2.0**-126


def signed_sums(rows: Tensor, w: Any, order: Order) -> Tensor:
    if not order.groups:
        return rows.new_empty(0, w.rows)
    parts = torch.split_with_sizes(rows, [count for _, count in order.groups])
    return torch.cat([w.matmul(part, e) for part, (e, _) in zip(parts, order.groups, strict=True)])


def magnitude_sums(rows: Tensor, w: Any, order: Order) -> Tensor:
    if not order.groups:
        return rows.new_empty(0, w.rows)
    parts = torch.split_with_sizes(rows.abs(), [count for _, count in order.groups])
    factors = w.alpha.abs().repeat_interleave(w.rows // w.alpha.shape[1], dim=1)
    return torch.cat(
        [part @ w.values(e).abs().T * factors[e] for part, (e, _) in zip(parts, order.groups, strict=True)]
    )


def run_whole(
    x: Tensor, operand: ExpertsOperand, ids: Tensor, weights: Tensor, shared: Tensor, out: Tensor | None = None
) -> Tensor:
    return moe(x, operand, ids, weights, shared, limit=LIMIT, **({} if out is None else {"out": out}))


def twin_whole(x: Tensor, operand: ExpertsOperand, ids: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    return down_ref(run_first(x, operand, ids, weights), operand, order_of(ids, operand.held), shared)


def whole_tolerance(args: tuple[Any, ...], expected: list[Tensor]) -> Tolerances:
    x, operand, ids, weights, shared = args
    mid = run_first(x, operand, ids, weights)
    return [down_error(mid, operand, order_of(ids, operand.held), shared) + rounding(expected[0])]


def three(
    make: Maker, name: str, operand: ExpertsOperand, x: Tensor, ids: Tensor, how: Treatment = "none"
) -> Iterator[Case]:
    treated, (tokens, topk) = replace(operand, in_treatment=how, mid_treatment=how), ids.shape
    both: Any = operand.w13, operand.down
    width, inner = (w.columns for w in both)
    weights, shared = make.uniform(tokens, topk) + 0.1, make.normal(tokens, width, dtype="bf16")
    mid = make.normal(tokens * topk, inner, dtype="bf16", scale=2)
    used = len(ids.unique())
    first, second = (used * nbytes(w.tiles[0]) for w in both)
    label = f"{name}, T = {tokens}" + ("" if how == "none" else f", {how}")
    args: tuple[Any, ...] = x, treated, ids, weights
    moved = first + nbytes(x, mid)
    yield Case("moe", f"gate, up {label}", "bf16", run_first, twin_first, args, first_tolerance, moved=moved)
    args = mid, treated, ids, shared
    moved = second + nbytes(mid, shared, shared)
    yield Case("moe", f"down {label}", "bf16", run_second, twin_second, args, second_tolerance, moved=moved)
    if tokens in (1, 3, 8, 20, 64, 130):  # a rank's part of a sum
        args = mid, treated, ids, shared.float()
        yield Case("moe", f"down to f32 {label}", "bf16", run_second, twin_second, args, second_tolerance)
        args = x, treated, ids, weights, shared.float()
        yield Case("moe", f"whole to f32 {label}", "bf16", run_whole, twin_whole, args, whole_tolerance)
    args = x, treated, ids, weights, shared
    moved = first + second + nbytes(x, mid, shared, shared)
    yield Case("moe", f"whole {label}", "bf16", run_whole, twin_whole, args, whole_tolerance, moved=moved)


def shares(make: Maker, size: Size) -> Iterator[Case]:
    """Of a layer that has three times the experts, those in the middle: most rows have pairs that are left out, the
    first has no other. Rows of the first half that no pair has are not written, so only the whole is compared.
    """
    operand, layer = operand_of(make, size), replace(size, experts=3 * size.experts)
    for tokens in (1, *size.tokens):
        x, ids = make.normal(tokens, size.width, dtype="bf16"), routed(make, layer, tokens)
        ids[0] = torch.arange(size.topk, device=make.device) - 1
        weights, shared = make.uniform(tokens, size.topk) + 0.1, make.normal(tokens, size.width, dtype="bf16")
        for how in ("none", "nvfp4"):
            part = replace(operand, in_treatment=how, mid_treatment=how, first=size.experts)
            args: tuple[Any, ...] = x, part, ids, weights, shared.float()
            label = f"whole to f32 {size.name}, the middle third, T = {tokens}, {how}"
            yield Case("moe", label, "bf16", run_whole, twin_whole, args, whole_tolerance)


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    for size in QUICK if quick else (*QUICK, replace(FLASH, experts=32)):
        yield from shares(make, size)
    for size in QUICK if quick else (*QUICK, *FULL):
        operand = operand_of(make, size)
        for tokens in size.tokens:
            x, ids = make.normal(tokens, size.width, dtype="bf16"), routed(make, size, tokens)
            yield from three(make, size.name, operand, x, ids)
            if tokens in (3, 8, 130, 200):
                yield from three(make, size.name, operand, x, ids, "nvfp4")
                yield from three(make, size.name, operand, x, ids, "fp8")
        for tokens in {min(size.tokens[-1], t) for t in (20, 64, 200)}:
            x = make.normal(tokens, size.width, dtype="bf16")
            same = routed(make, size, 1).expand(tokens, -1).contiguous()
            yield from three(make, f"{size.name} same experts", operand, x, same)
            yield from three(make, f"{size.name} one expert", operand, x, torch.full_like(same[:, :1], 3))
        if 5 <= size.experts <= 8:
            ids = stepped(make, size)
            x = make.normal(len(ids), size.width, dtype="bf16")
            yield from three(make, f"{size.name} ever more tokens", operand, x, ids)
        x, ids = make.normal(8, size.width, dtype="bf16"), torch.full((8, 6), 3, device=make.device)
        yield from three(make, f"{size.name} one expert six times", operand, x, ids)
    for size in QUICK if quick else (*QUICK, replace(FLASH, experts=8)):
        operand = operand_of(make, size, every_scale=True)
        for tokens in (8, 130):
            x, ids = make.normal(tokens, size.width, dtype="bf16"), routed(make, size, tokens)
            yield from three(make, f"{size.name} every scale", operand, x, ids)
            x = x * torch.tensor([1, 2.0**40, 2.0**-40, 0], device=make.device).repeat(tokens)[:tokens, None].bfloat16()
            x[1, 5], x[2, : size.width // 2] = float("nan"), 0
            yield from three(make, f"{size.name} rows far apart, one NaN", operand, x, ids)
