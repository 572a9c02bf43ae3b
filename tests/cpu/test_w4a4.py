"""W4A4 on CPU: the operand bytes a Blackwell GEMM would be given, decoded by other code and multiplied in float64.

`act="nvfp4"` quantises every row of an input to codes, scales and a global. These tests take exactly those bytes, put
the scales in their swizzled places, read everything back with the oracle's decoders, and demand that the ops agree with
the float64 product to within float32 accumulation and the rounding of the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle.formats import decode_e2m1, decode_e8m0, unpack_nibbles
from oracle.nvfp4 import Operand, quantise_rows
from oracle.writer import official_config, write_checkpoint
from torch import Tensor

import dsv4
from dsv4.kernels.grouped_linear.grouped_linear import grouped_linear
from dsv4.kernels.grouped_linear.operand import grouped_operand
from dsv4.kernels.linear.linear import linear
from dsv4.kernels.linear.operand import linear_operand
from dsv4.kernels.moe.moe import moe
from dsv4.kernels.moe.operand import experts_operand
from dsv4.layers import attention as attention_layer
from dsv4.layers import indexer as indexer_layer
from dsv4.layers import moe as moe_layer
from dsv4.quant import nvfp4
from dsv4.quant.layouts import swizzle_32_4_4
from dsv4.quant.weights import MXFP4Weight, NVFP4Weight, Weight
from dsv4.testing.tolerance import BF16_ROUNDING, FLOAT32_ROUNDING, dot_error

OUTPUT = {torch.bfloat16: BF16_ROUNDING, torch.float32: 0.0}
ROUNDINGS = 3  # float32: the global folded into each value of a row, the product with it, and the weight's global


def as_bytes(codes: Tensor, scale: Tensor, globals_: Tensor) -> Operand:
    """Quantised rows [R, K] as the GEMM takes them: scales swizzled."""
    flat = swizzle_32_4_4(scale).view(torch.uint8)
    return Operand(codes.numpy(), flat.numpy(), globals_.numpy())


def weight_values(weight: Weight) -> np.ndarray:
    """A weight [N, K] read by the oracle's decoders, float64."""
    if isinstance(weight, MXFP4Weight):
        values = decode_e2m1(unpack_nibbles(weight.codes.numpy()))
        return values * np.repeat(decode_e8m0(weight.scale.numpy()), 32, axis=-1)
    assert isinstance(weight, NVFP4Weight)
    return as_bytes(weight.codes, weight.scale, weight.global_scale).values()


def random_weight(n: int, k: int, seed: int) -> NVFP4Weight:
    """Every code, and scales from the whole range of E4M3 that leaves products finite, around a random global."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (n, k // 2), generator=g, dtype=torch.uint8)
    scale = torch.randint(1, 0x7F, (n, k // 16), generator=g, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return NVFP4Weight(codes, scale, torch.rand((), generator=g) + 0.5)


def rough(rows: int, k: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Activations with outliers, a row of zeros, a tiny row and a block of zeros."""
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))
    x[:, 3] *= 40
    x[-1] = 0
    x[0] *= 2.0**-40
    x[:, 16:32] = 0
    return x.to(dtype)


def agree(found: Tensor, rows: np.ndarray, weight: np.ndarray) -> None:
    """found [T, N] is rows @ weight^T to within float32 accumulation and the rounding of its dtype."""
    exact, magnitudes = torch.from_numpy(rows @ weight.T), torch.from_numpy(np.abs(rows) @ np.abs(weight).T)
    bound = dot_error(exact, magnitudes, rows.shape[1], roundings=ROUNDINGS, output=OUTPUT[found.dtype])
    excess = (found.double() - exact).abs() - bound
    assert (excess <= 0).all(), f"{int((excess > 0).sum())} of {excess.numel()} beyond the bound, by {excess.max():.3e}"


@pytest.fixture
def operands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Operand]]:
    """Every per-row quantisation the ops do: its input rows and the bytes it made of them."""
    taken: list[tuple[Tensor, Operand]] = []
    quantize = nvfp4.quantize

    def tap(x: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        result = quantize(x, **options)
        if options.get("per_row"):
            taken.append((x.flatten(0, -2), as_bytes(*(part.flatten(0, x.ndim - 2) for part in result))))
        return result

    monkeypatch.setattr(nvfp4, "quantize", tap)
    return taken


@pytest.mark.parametrize("rows", [1, 5, 127, 129])
@pytest.mark.parametrize("k", [16, 64, 208, 512])
def test_operand_bytes_are_those_of_the_definition(rows: int, k: int) -> None:
    x = rough(rows + 1, k, torch.float32, seed=k)[:-1]  # what a row of zeros gives is a convention, not the format's
    found = as_bytes(*nvfp4.quantize(x, per_row=True))
    expected = quantise_rows(x.numpy())
    np.testing.assert_array_equal(found.globals, expected.globals)
    np.testing.assert_array_equal(found.scales, expected.scales)
    np.testing.assert_array_equal(found.codes & 0x77, expected.codes & 0x77)
    np.testing.assert_array_equal(found.values(), expected.values())


@pytest.mark.parametrize("dtype", OUTPUT, ids=str)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 40, 16), (5, 200, 208), (130, 64, 512), (3, 384, 4096)])
def test_linear_is_the_product_of_its_bytes(
    operands: list[tuple[Tensor, Operand]], rows: int, n: int, k: int, dtype: torch.dtype
) -> None:
    x = rough(rows, k, dtype, seed=n)
    trained = NVFP4Weight.quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(k)) * k**-0.5)
    for weight in (trained, random_weight(n, k, seed=k)):
        operands.clear()
        (found,) = linear(x, linear_operand(weight, act="nvfp4"))
        assert found.dtype == dtype
        ((_, taken),) = operands
        agree(found, taken.values(), weight_values(weight))


@pytest.mark.parametrize("dtype", OUTPUT, ids=str)
def test_grouped_linear_is_the_product_of_its_bytes(operands: list[tuple[Tensor, Operand]], dtype: torch.dtype) -> None:
    groups, rank, width = 4, 24, 96
    x, weight = rough(7, groups * width, dtype, 1), random_weight(groups * rank, width, 2)
    found = grouped_linear(x, grouped_operand(weight, groups, act="nvfp4")).unflatten(1, (groups, rank))
    ((_, taken),) = operands
    rows = taken.values().reshape(7, groups, width)
    values = weight_values(weight).reshape(groups, rank, width)
    for g in range(groups):
        agree(found[:, g], rows[:, g], values[g])


def check_moe(
    taken: list[tuple[Tensor, Operand]],
    found: Tensor,
    stacks: tuple[Weight, Weight, Weight],
    ids: Tensor,
    weights: Tensor,
    shared: Tensor,
    limit: float,
) -> None:
    """Both products of every chosen expert from the bytes: what w2 is given, then the sum."""
    (_, x), (mid, mid_bytes) = taken
    output, topk = OUTPUT[found.dtype], ids.shape[1]
    order = np.argsort(ids.flatten().numpy(), kind="stable")  # the op groups rows by expert
    rows, mids = x.values(), mid_bytes.values()
    total = shared.double().clone()
    slack, size = torch.zeros_like(total), total.abs()
    for place, pair in enumerate(order):
        token, expert = int(pair) // topk, int(ids.flatten()[pair])
        w1, w2, w3 = (weight_values(stack.select(expert)) for stack in stacks)
        a, b, route = torch.from_numpy(rows[token]), torch.from_numpy(mids[place]), weights.flatten()[pair].double()
        gate, gate_error = product(a, w1, output)
        up, up_error = product(a, w3, output)
        s, u = torch.nn.functional.silu(gate.clamp(max=limit)), up.clamp(-limit, limit)
        expected = route * s * u  # |silu'| < 1.1; eight float32 roundings in silu and the two products
        error = route * (1.1 * gate_error * (u.abs() + up_error) + s.abs() * up_error)
        error = 1.01 * (error + (output + 8 * FLOAT32_ROUNDING) * expected.abs())
        assert ((mid[place].double() - expected).abs() <= error + 1e-30).all()
        down, down_error = product(b, w2, output)
        total[token] += down
        slack[token] += down_error
        size[token] += down.abs()
    slack += (topk + 1) * FLOAT32_ROUNDING * 1.01 * size
    assert ((found.double() - total).abs() <= slack * (1 + output) + output * total.abs()).all()


def product(row: Tensor, weight: np.ndarray, output: float) -> tuple[Tensor, Tensor]:
    """weight [N, K] times row [K] in float64, and how far the op may be from it."""
    w = torch.from_numpy(weight)
    exact = w @ row
    return exact, dot_error(exact, w.abs() @ row.abs(), len(row), roundings=ROUNDINGS, output=output)


@pytest.mark.parametrize("dtype", OUTPUT, ids=str)
def test_moe_is_the_products_of_its_bytes(operands: list[tuple[Tensor, Operand]], dtype: torch.dtype) -> None:
    tokens, hidden, width, experts, topk = 9, 64, 48, 5, 2
    g = torch.Generator().manual_seed(0)
    stacks = tuple(
        NVFP4Weight.quantize(torch.randn(experts, n, k, generator=g) * 3 * k**-0.5)
        for n, k in ((width, hidden), (hidden, width), (width, hidden))
    )
    x, shared = torch.randn(tokens, hidden, generator=g).to(dtype), torch.randn(tokens, hidden, generator=g).to(dtype)
    ids = torch.rand(tokens, experts, generator=g).argsort(1)[:, :topk]
    weights = torch.rand(tokens, topk, generator=g)
    found = moe(x, experts_operand(*stacks, act="nvfp4"), ids, weights, shared, limit=4.0)
    check_moe(operands, found, stacks, ids, weights, shared, 4.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    return write_checkpoint(tmp_path_factory.mktemp("w4a4"), official_config([4, 128]), seed=3)


@pytest.mark.parametrize("policy", ["nvfp4", "native"])
def test_every_product_of_a_whole_model_is_the_product_of_its_bytes(
    checkpoint: Path,
    operands: list[tuple[Tensor, Operand]],
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
) -> None:
    """BF16, all linears NVFP4, or experts as stored (MXFP4 weights with NVFP4 inputs): real activations, each op."""
    seen: list[str] = []

    def checked_linear(x: Tensor, operand: Any) -> list[Tensor]:
        operands.clear()
        results = linear(x, operand)
        for place in (place for part in operand.joined if part.treatment == "nvfp4" for place in part.places):
            agree(results[place], operands[0][1].values(), weight_values(operand.projections[place].weight))
            seen.append("linear")
        return results

    def checked_grouped(x: Tensor, operand: Any) -> Tensor:
        operands.clear()
        result = grouped_linear(x, operand)
        if operand.treatment == "nvfp4":
            groups = operand.groups.values.shape[0]
            rows = operands[0][1].values().reshape(len(x), groups, -1)
            values = weight_values(operand.weight).reshape(groups, -1, rows.shape[-1])
            for g, part in enumerate(result.chunk(groups, dim=1)):
                agree(part, rows[:, g], values[g])
            seen.append("grouped")
        return result

    def checked_moe(x: Tensor, operand: Any, ids: Tensor, weights: Tensor, shared: Tensor, *, limit: float) -> Tensor:
        operands.clear()
        result = moe(x, operand, ids, weights, shared, limit=limit)
        check_moe(operands, result, (operand.w1, operand.w2, operand.w3), ids, weights, shared, limit)
        seen.append("moe")
        return result

    for layer in (attention_layer, indexer_layer, moe_layer):
        monkeypatch.setattr(layer, "linear", checked_linear)
    monkeypatch.setattr(attention_layer, "grouped_linear", checked_grouped)
    monkeypatch.setattr(moe_layer, "moe", checked_moe)
    model = dsv4.load(checkpoint, dtype="bfloat16", act="nvfp4", weights=policy)
    assert model.logits(torch.arange(50) * 7 % 512).isfinite().all()
    # per layer: wq_a, wkv, wq_b, wo_b, three shared; the CSA layer's indexer.wq_b besides
    wanted = {"linear": 2 * 7 + 1, "grouped": 2, "moe": 2} if policy == "nvfp4" else {"moe": 2}
    assert {name: seen.count(name) for name in set(seen)} == wanted
