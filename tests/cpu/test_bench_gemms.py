"""Per-op tables: products of a prompt, batches side by side, operands on weights of their own, and FLOP."""

from __future__ import annotations

import copy
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from bench_fakes import RUN, FakeStep, FakeTimer

from dsv4 import load
from dsv4.bench import report
from dsv4.bench.flop import flop_of
from dsv4.bench.gemms import bench_gemms
from dsv4.bench.kernels import bench_kernels, by_batch, copied, verdict
from dsv4.bench.prefill import bench_prefill
from dsv4.bench.record import Call
from dsv4.bench.roofline import stored_bytes
from dsv4.bench.traffic import weight_bytes
from dsv4.kernels.linear.launch import Launcher
from dsv4.kernels.linear.operand import Joined, LinearOperand, Projection
from dsv4.kernels.linear.tiled import TiledRows, tiled
from dsv4.kernels.moe.moe import moe
from dsv4.model import Model
from dsv4.quant.weights import PlainWeight


@pytest.fixture(scope="module")
def tiny() -> Model:
    return load("random:tiny")


def flop_by_hand(model: Model, chunks: list[int]) -> int:
    """From the shapes of what is stored: every linear by every row, K experts a row, the head once a chunk; the
    indexers' queries only where a sequence has more entries than are picked.
    """
    stored, config = stored_bytes("random:tiny", "native"), model.config
    shapes = {spec.name: prod(spec.shape) for spec, _ in stored if spec.role == "linear" and spec.name != "head"}
    queries = sum(size for name, size in shapes.items() if name.endswith("indexer.wq_b"))
    experts = len(config.layers) * config.num_experts_per_tok * 3 * config.hidden_size * config.moe_intermediate_size
    total, read = 0, 0
    for rows in chunks:
        read += rows
        unscored = queries if read // 4 <= config.index_topk else 0
        total += rows * (sum(shapes.values()) - unscored + experts) + config.vocab_size * config.hidden_size
    return 2 * total


@pytest.mark.parametrize(("chunk", "chunks"), [(64, [40]), (20, [20, 20])])
def test_prefill_counts_what_it_multiplies(tiny: Model, chunk: int, chunks: list[int]) -> None:
    how: dict[str, Any] = {"contexts": [40], "repeats": 3, "warmup": 0, "chunk": chunk}
    [row] = bench_prefill(tiny, stored_bytes("random:tiny", "native"), RUN, FakeTimer(), **how)
    assert row.more["flop"] == flop_by_hand(tiny, chunks)
    assert row.more["tflop_s"] == round(row.more["flop"] / 101 * 1e-6, 1)
    assert row.more["dense_share"] == round(row.more["flop"] / 101e6 / 800, 4) and row.more["dense_tflop_s"] == 800


def test_products_of_a_prompt_have_a_row_per_shape(tiny: Model) -> None:
    rows = list(bench_gemms(tiny, RUN, FakeTimer(), rows=40, repeats=3))
    assert {row.values["op"] for row in rows} == {"linear", "grouped_linear", "moe"}
    assert all(row.values["shape"].startswith("[40, ") for row in rows)  # and the head, of one row, is none of them
    layers = len(tiny.config.layers)
    by_op = {op: sum(r.values["calls"] for r in rows if r.values["op"] == op) for op in ("grouped_linear", "moe")}
    assert by_op == {"grouped_linear": layers, "moe": layers}
    head = 2 * tiny.config.vocab_size * tiny.config.hidden_size
    [whole] = bench_prefill(
        tiny, stored_bytes("random:tiny", "native"), RUN, FakeTimer(), contexts=[40], chunk=40, repeats=3
    )
    assert sum(row.values["flop"] * row.values["calls"] for row in rows) == whole.more["flop"] - head
    assert set(report.GEMM_COLUMNS) <= rows[0].columns.keys()
    [moe] = [row for row in rows if row.values["op"] == "moe"]
    assert moe.values["us"] == 25.25 and moe.values["tflop_s"] == round(moe.values["flop"] / 25.25e6, 1)


def test_experts_count_where_they_are_held(tiny: Model) -> None:
    config, whole = tiny.config, tiny.blocks[0].ffn.experts
    ids = torch.tensor([[0, 1, 5], [6, 5, -1]])
    args = torch.zeros(2, config.hidden_size), whole, ids, torch.ones(2, 3), torch.zeros(2, config.hidden_size)
    call = Call("moe", moe, args, {"limit": 10.0}, None)
    pair = 2 * 3 * config.hidden_size * config.moe_intermediate_size
    assert flop_of(call) == 5 * pair and weight_bytes(call) == round(whole.nbytes * 4 / 7)
    half = replace(whole, down=replace(whole.down, values=whole.down.values[:3]), first=4, nbytes=700)
    share = Call("moe", moe, (args[0], half, *args[2:]), {"limit": 10.0}, None)
    assert half.held == range(4, 7) and flop_of(share) == 3 * pair and weight_bytes(share) == round(700 * 2 / 3)


# ------------------------------------------------------------------------------------------- batches side by side


def a_row(batch: int, op: str, shape: str, us: float, share: float, weights: int) -> report.Row:
    values = {"batch": batch, "op": op, "shape": shape, "us": us, "share": share, "weight_bytes": weights}
    return report.Row(RUN, values)


ROWS = [
    a_row(1, "linear", "[1, 64] x 9.00 MB", 2.04, 0.9, 9_000_000),
    a_row(1, "linear", "[1, 64] x 6.00 MB", 3.0, 0.799, 6_000_000),
    a_row(1, "rms_norm", "[1, 64] x [64]", 1.0, 0.01, 0),
    a_row(8, "linear", "[8, 64] x 9.00 MB", 2.5, 0.75, 9_000_000),
    a_row(8, "linear", "[8, 64] x 6.00 MB", 3.5, 0.7, 6_000_000),
    a_row(8, "rms_norm", "[8, 64] x [64]", 1.5, 0.02, 0),
    a_row(8, "linear", "[8, 64] x 7.00 MB", 4.5, 0.6, 7_000_000),
]


def test_batches_stand_side_by_side_and_what_one_lacks_is_left_open() -> None:
    columns, lines = by_batch(ROWS)
    assert columns == ("at_1", "at_8")
    shapes = ["[1, 64] x 9.00 MB", "[1, 64] x 6.00 MB", "[1, 64] x [64]", "[8, 64] x 7.00 MB"]
    assert [line["shape"] for line in lines] == shapes
    assert (lines[0]["at_1"], lines[0]["at_8"]) == ("2.0  90%", "2.5  75%") and "at_1" not in lines[3]
    assert [line["over_5_MB"] for line in lines] == ["yes", "yes", None, "yes"]
    assert [line["weight_bytes"] for line in lines] == [9_000_000, 6_000_000, None, 7_000_000]


def test_the_verdict_is_of_the_smallest_batch_and_names_what_falls_short() -> None:
    assert verdict(ROWS) == (
        "batch 1: 1 of 2 products with more than 5 MB of weights reach 80% of copy bandwidth; below: "
        "linear [1, 64] x 6.00 MB 79.9%"
    )
    assert verdict(ROWS[2:3]).startswith("batch 1: 0 of 0") and "below" not in verdict(ROWS[:1])


def test_several_batches_run_in_one_process(tiny: Model) -> None:
    rows = list(bench_kernels(tiny, RUN, FakeTimer(), FakeStep, batches=[1, 3], context=40, repeats=3))
    columns, lines = by_batch(rows)
    assert columns == ("at_1", "at_3") and {row.values["batch"] for row in rows} == {1, 3}
    both = [line for line in lines if all(column in line for column in columns)]
    assert {"linear", "grouped_linear", "moe", "sparse_attention"} <= {line["op"] for line in both}
    moe = {row.values["batch"]: row.values["weight_bytes"] for row in rows if row.values["op"] == "moe"}
    one = tiny.blocks[0].ffn.experts.nbytes * tiny.config.num_experts_per_tok / tiny.config.n_routed_experts
    assert moe[1] == pytest.approx(one, abs=1) and moe[3] > moe[1]
    assert all(row.values["weight_bytes"] == 0 for row in rows if row.values["op"] == "sparse_attention")


def test_a_copied_operand_multiplies_with_weights_of_its_own(tiny: Model) -> None:
    """As on a GPU: the launcher's table holds addresses, which a plain copy could not follow."""
    packed = [tiled(PlainWeight(torch.randn(n, 64).bfloat16())) for n in (32, 48)]
    launcher = Launcher(packed)
    launcher.cold = False
    joined = Joined("none", TiledRows(tuple(packed)), [32, 48], [0, 1])
    operand = LinearOperand(tuple(map(Projection, packed)), (joined,), launcher)
    with pytest.raises(ValueError, match="ctypes"):
        copy.deepcopy(operand)
    twin = copied(operand)
    weights = [projection.weight for projection in twin.projections]
    assert twin.launcher is not launcher and list(twin.launcher.parts) == weights and twin.launcher.cold is False
    addresses = [row.tiles for row in twin.launcher.table]
    assert addresses == [weight.tiles.data_ptr() for weight in weights]
    assert not {row.tiles for row in launcher.table} & set(addresses)
    assert all(torch.equal(a.tiles, b.tiles) for a, b in zip(packed, weights, strict=True))
    assert twin.joined[0].matrix.parts == tuple(weights) and twin.nbytes == operand.nbytes
    experts = copied(tiny.blocks[0].ffn.experts)
    assert experts.down.values.data_ptr() != tiny.blocks[0].ffn.experts.down.values.data_ptr()
