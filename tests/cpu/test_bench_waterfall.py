"""Where a step goes: what launches add when they overlap, whose they are, which layer, and the picture of it."""

from __future__ import annotations

import xml.etree.ElementTree

import pytest

from dsv4.bench.owners import kernel_owners, owner_of
from dsv4.bench.timing import Kernel, last_launch
from dsv4.bench.traffic import Work
from dsv4.bench.waterfall import Bar, bars, layers_of, table
from dsv4.bench.waterfall_plot import DARK, LIGHT, svg
from dsv4.errors import KernelError

LINEAR, SUM = "void dsv4::linear::linear_many<2, true>(Many)", "(anonymous namespace)::sum_kernel(Many, int)"
REDUCE = "void (anonymous namespace)::one_shot_all_reduce_kernel<float, 16, 2>(float**)"
CAST = "void at::native::vectorized_elementwise_kernel<8, at::native::bfloat16_copy_kernel_cuda(TensorIterator&)::{x}>"
# A layer as it runs on one of two GPUs: (kernel, start, end), of which the third ends inside the second.
LAYER = [
    ("void (anonymous namespace)::mhc_seam<dsv4::bf16>(Args)", 0, 8),
    (LINEAR, 2, 14),
    (SUM, 6, 13),
    ("(anonymous namespace)::attn_inputs_rows(Arguments)", 9, 16),
    (LINEAR, 10, 26),
    (LINEAR, 12, 36),
    (REDUCE, 37, 44),
    (CAST, 44, 45),
    ("void dsv4::moe::few<true, true>(dsv4::moe::Few)", 45, 80),
]
CALLS = [
    Work("mhc_seam", "", 100),
    Work("linear", "[1, 4096] x 3 MB", 3_000_000),
    Work("attn_inputs", "", 50),
    Work("grouped_linear", "[1, 8192] x 20 MB", 20_000_000),
    Work("linear", "[1, 8192] x 10 MB", 10_000_000),
    Work("moe", "[1, 4096] x 99 MB", 80_000_000),
]
LEAVE = ("void (anonymous namespace)::mhc_post<dsv4::bf16>(x)", 1.0, 5.0)
COPY = "Memcpy DtoH (Device -> Pinned)"


def kernels(layers: int = 2, first: float = 1000.0) -> list[Kernel]:
    """Layers of 80 us each from `first` on, the launch that leaves the last, and a copy after a gap of 3 us."""
    found = [Kernel(n, first + 80 * i + a, first + 80 * i + b) for i in range(layers) for n, a, b in LAYER]
    name, start, end = LEAVE
    last = first + 80 * layers
    return [*found, Kernel(name, last + start, last + end), Kernel(COPY, last + end + 3, last + end + 5)]


def step(layers: int = 2) -> list[Bar]:
    return bars(kernels(layers), [*CALLS * layers, Work("mhc_post", "", 7)])


def test_what_launches_add_is_the_step_and_waiting_is_not_counted() -> None:
    found = step()
    assert [bar.visible for bar in found[:9]] == [8, 6, 0, 2, 10, 10, 8, 1, 35]
    assert [bar.gap for bar in found[:9]] == [0, 0, 0, 0, 0, 0, 1, 0, 0]
    assert [bar.own for bar in found[:3]] == [8, 12, 7]
    assert (found[-1].visible, found[-1].gap, found[-1].own) == (5, 3, 2)
    assert sum(bar.visible for bar in found) == kernels()[-1].end - kernels()[0].start == 170


def test_a_launch_has_the_op_the_shape_and_the_bytes_of_its_call() -> None:
    found = step()[:9]
    assert [(bar.op, bar.nbytes) for bar in found] == [
        ("mhc_seam", 100),
        ("linear", 3_000_000),
        ("linear", 0),  # the sum of the linear in front
        ("attn_inputs", 50),
        ("grouped_linear", 20_000_000),
        ("linear", 10_000_000),
        ("torch: one_shot_all_reduce_kernel", 0),
        ("torch: bfloat16_copy_kernel_cuda", 0),
        ("moe", 80_000_000),
    ]
    assert found[2].shape == found[1].shape == "[1, 4096] x 3 MB" and found[3].shape == ""
    assert found[5].name == "linear [1, 8192] x 10 MB" and step()[-1].op == "memcpy"


def test_calls_that_do_not_fit_their_launches_share_bytes_and_keep_their_sum() -> None:
    found = [bar for bar in bars(kernels(1), CALLS[:2]) if bar.op == "linear"]  # one call, four launches
    assert [bar.nbytes for bar in found] == [750_000] * 4 and {bar.shape for bar in found} == {""}
    assert sum(bar.nbytes for bar in bars(kernels(1), [Work("linear", "", 7)])) == 7
    assert {bar.nbytes for bar in bars(kernels(1), [])} == {0} and bars([], CALLS) == []


def test_the_table_has_a_row_per_op_and_shape_then_the_step() -> None:
    rows = table(step(), 2, 4000.0)
    names = [(row["op"], row["shape"]) for row in rows]
    assert names[:3] == [("mhc_seam", ""), ("linear", "[1, 4096] x 3 MB"), ("attn_inputs", "")]
    assert names[-1] == ("step", "") and len(names) == len(set(names)) == 11
    linear, whole = rows[1], rows[-1]
    assert (linear["launches"], linear["us"], linear["us_per_launch"], linear["us_per_layer"]) == (4, 12, 3, 6)
    assert (linear["bytes"], linear["gb_s"], linear["share"], linear["own_us"]) == (6_000_000, 500, 0.125, 38)
    assert whole["us"] == 170 == sum(row["us"] for row in rows[:-1])
    assert whole["gap_us"] == 6 == sum(row["gap_us"] for row in rows[:-1])
    assert whole["launches"] == len(step()) and whole["bytes"] == sum(row["bytes"] or 0 for row in rows[:-1])
    reduce = next(row for row in rows if "reduce" in row["op"])
    assert reduce["bytes"] is reduce["gb_s"] is reduce["share"] is None and reduce["gap_us"] == 2


def test_layers_are_told_apart_by_the_streams_that_they_leave() -> None:
    layers = layers_of(step(3))
    assert [len(layer) for layer in layers] == [9, 9, 9]
    assert all(layer[0].op == "mhc_seam" and layer[-1].op == "moe" for layer in layers)
    assert layers_of([bar for bar in step() if bar.op != "moe"]) == []


def test_the_last_of_several_launches_counts_and_not_what_a_slow_profiler_adds() -> None:
    slow = [Kernel(k.name, k.start - 5000 * (i < 7), k.end - 5000 * (i < 6)) for i, k in enumerate(kernels())]
    launches = [*slow, *kernels(first=2000), *kernels(first=3000)]
    assert max(k.end - k.start for k in slow) > 5000
    assert last_launch(launches[::-1], 3) == kernels(first=3000)
    for unequal in (launches[:-1], [*launches[:-1], Kernel("other", 9000, 9001)], []):
        with pytest.raises(KernelError, match="cannot be told apart"):
            last_launch(unequal, 3)


def test_the_picture_has_a_bar_per_launch_on_one_scale() -> None:
    [layer] = layers_of(step(1))
    text = svg({"layer 5, csa": layer, "layer 6, hca": layer[:4]}, 4000.0, "random:flash & co")
    root = xml.etree.ElementTree.fromstring(text)
    words = [node.text for node in root if node.tag.endswith("text")]
    assert "random:flash & co" in words and "layer 5, csa: 80.0 us" in words and "layer 6, hca: 16.0 us" in words
    assert words.count("linear [1, 4096] x 3 MB") == 4 and "10.0 (5.0)" in words and "35.0 (20.0)" in words
    light, dark = ([n for n in root if n.get("fill") == colour and n.get("height") == "14"] for colour in (LIGHT, DARK))
    assert len(light) == 9 + 4 and len(dark) == len(light) - 2  # the sum adds nothing
    scale = float(light[0].attrib["width"]) / 8
    for bar, node in zip(layer, light, strict=False):
        assert float(node.attrib["width"]) == pytest.approx(bar.own * scale, abs=0.5)
    for bar, node in zip((bar for bar in layer if bar.visible), dark, strict=False):
        assert float(node.attrib["width"]) == pytest.approx((bar.visible - bar.gap) * scale, abs=0.5)
    ticks = [float(node.attrib["d"][1:].split(" ")[0]) for node in root if node.get("stroke-width") == "2"]
    told = [(bar, node) for bar, node in zip(layer, light, strict=False) if bar.nbytes]
    for (bar, node), tick in zip(told, ticks, strict=False):  # the floor begins where the launch begins to add
        begins = float(node.attrib["x"]) + (max(bar.start, bar.before) - bar.start) * scale
        assert tick == pytest.approx(begins + bar.nbytes / 4000e3 * scale, abs=0.2)
    assert len(ticks) == len(told) + 3
    assert svg({}, 4000.0, "nothing").startswith("<svg")


def test_kernels_are_told_by_the_sources_that_define_them() -> None:
    owners = kernel_owners()
    assert {"router", "rms_norm", "mhc_pre"} <= set(owners.values())
    assert owners["router"] == owner_of("void (anonymous namespace)::router<256>(float const*, long*)") == "router"
    assert owners["few"] == owners["stream"] == "moe"  # in headers that only moe.cu includes
    assert owner_of("Memcpy DtoD (Device -> Device)") == "memcpy"
    assert owner_of("void at::native::elementwise<router>(int)") == "torch: elementwise"
    assert owner_of("memcpy32_post") == "torch: memcpy32_post"
