"""tools/bench_peer_kernels.py: everyone on the same values, no result believed unchecked, failures survived."""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from bench_fakes import FakeTimer
from torch import Tensor

from dsv4.kernels.case import Maker
from dsv4.quant.weights import NVFP4Weight

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_peer_kernels.py"
SHAPES = [("one", 64, 48), ("two", 32, 16)]
BATCHES = [1, 3]


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("bench_peer_kernels", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclasses
    sys.path.insert(0, str(TOOL.parent))  # as when it is run
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(TOOL.parent))
    return module


def subjects(tool: Any) -> Any:
    """The module that makes what `tool` measures."""
    return sys.modules[tool.dense.__module__]


class Fake:
    """A peer that multiplies float32 values; what it should do wrong is `fault`."""

    version = "1"

    def __init__(self, name: str = "fake", fault: str = "") -> None:
        self.name, self.fault = name, fault

    def ready(self) -> None:
        pass

    def linear(self, weight: NVFP4Weight, batches: Any) -> Any:
        if self.fault == "unmade" and weight.shape[0] == 48:
            raise RuntimeError("no such shape\nand more")
        values = weight.dequantize() * (1.03 if self.fault == "wrong" else 1)

        def bind(x: Tensor) -> Any:
            if self.fault == "unbound" and len(x) == 3:
                raise AssertionError
            return lambda: (x.float() @ values.T).bfloat16()

        return bind

    def experts(self, w13: NVFP4Weight, w2: NVFP4Weight, topk: int, limit: float, batches: Any) -> Any:
        first, second = w13.dequantize(), w2.dequantize()
        limit = 1e9 if self.fault == "wrong" else limit

        def bind(x: Tensor, ids: Tensor) -> Any:
            def call() -> Tensor:
                gate, up = torch.einsum("tkfd,td->tkf", first[ids], x.float()).bfloat16().float().chunk(2, -1)
                middle = (torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)).bfloat16()
                return torch.einsum("tkdf,tkf->tkd", second[ids], middle.float()).flatten(0, 1).bfloat16()

            return call

        return bind


def run(tool: Any, out: Path, *peers: Any, **more: Any) -> list[dict[str, str]]:
    size = tool.Size(experts=4, width=64, inner=32, topk=2)
    how = {"batches": BATCHES, "shapes": SHAPES, "size": size, "rounds": 2, "device": "cpu", "command": "it"}
    path = tool.bench(peers, FakeTimer(), out, **(how | more))
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_everyone_is_measured_at_every_shape_and_batch(
    tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(tool, tmp_path, Fake())
    assert [(r["op"], r["batch"], r["who"]) for r in rows] == [
        (op, str(batch), who) for op in ("one", "two", "experts") for batch in BATCHES for who in ("dsv4", "fake")
    ]
    assert {r["error"] for r in rows} == {""} and {r["gpu"] for r in rows} == {"NVIDIA Fake 80GB"}
    theirs = [r for r in rows if r["who"] == "fake"]
    assert {r["ratio"] for r in theirs} == {"1.0"} and {r["command"] for r in theirs} == {"it"}
    dense = next(r for r in theirs if r["op"] == "one" and r["batch"] == "3")
    nbytes = 48 * 32 + 48 * 4 + 4 + 2 * 3 * (64 + 48)  # codes, scales, global; input and output
    us = 101 / 66  # three weights take turns, 22 times
    assert int(dense["bytes"]) == nbytes and float(dense["us"]) == pytest.approx(us, abs=1e-3)
    assert float(dense["share"]) == pytest.approx(nbytes / us * 1e-3 / 4000, abs=1e-3)
    assert len(capsys.readouterr().out.splitlines()) == 1 + 3 * len(BATCHES)


def test_faults_are_told_and_the_rest_goes_on(tool: Any, tmp_path: Path) -> None:
    faults = ("wrong", "unmade", "unbound")
    rows = run(tool, tmp_path, *(Fake(fault, fault) for fault in faults))
    error = {(r["who"], r["op"], r["batch"]): r["error"] for r in rows}
    assert all("allowed" in text for (who, _, _), text in error.items() if who == "wrong")
    unmade = {key: text for key, text in error.items() if key[0] == "unmade" and text}
    assert unmade == {("unmade", "one", str(batch)): "RuntimeError: no such shape" for batch in BATCHES}
    unbound = {key for key, text in error.items() if key[0] == "unbound" and text}
    assert unbound == {("unbound", op, "3") for op in ("one", "two")}
    assert all(r["us"] == r["ratio"] == "" for r in rows if r["error"])
    assert all(r["us"] for r in rows if r["who"] == "dsv4")


def test_an_op_that_cannot_be_made_does_not_end_the_run(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*given: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(subjects(tool), "exact_experts", full)
    rows = run(tool, tmp_path, Fake())
    assert {r["op"] for r in rows} == {"one", "two"} and not any(r["error"] for r in rows)
    assert "experts       stopped: OutOfMemoryError: no room" in capsys.readouterr().out


def test_weights_that_take_turns_do_not_fit_the_cache(tool: Any) -> None:
    for columns, rows in ((4096, 1536), (1024, 32768), (4096, 32768)):
        nbytes = rows * columns * 9 // 16
        assert subjects(tool).copies(nbytes, 60 << 20) * nbytes >= min(4 * (60 << 20), 64 * nbytes)


def test_check_allows_rounding_and_nothing_else(tool: Any) -> None:
    exact = torch.randn(5, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tool.check(exact.bfloat16().double(), exact)
    swapped = exact.clone()
    swapped[4, [7, 8]] = swapped[4, [8, 7]]
    row = exact.clone()
    row[3] *= 1.02
    for bad in (swapped, row, exact * float("nan"), exact[:4]):
        with pytest.raises(ValueError, match=r"wrong|shape"):
            tool.check(bad, exact)


def test_what_is_missing_is_named(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "humming", None)
    monkeypatch.setattr(sys, "argv", ["bench_peer_kernels.py"])
    with pytest.raises(SystemExit, match=r"humming-kernels cannot be imported .* pip install humming-kernels"):
        tool.main()
    stand_in(monkeypatch)

    def old() -> None:
        raise OSError("undefined symbol")

    monkeypatch.setattr(sys.modules["humming.ops.utils"], "init_humming_launcher", old)
    with pytest.raises(SystemExit, match=r"cannot be imported .OSError: undefined symbol"):
        tool.main()
    monkeypatch.setattr(sys, "argv", ["bench_peer_kernels.py", "--only", "wq_b,nothing"])
    with pytest.raises(SystemExit, match="2"):
        tool.main()


def test_humming_gets_our_values_in_its_words(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a stand-in for its modules that does arithmetic on what it is given."""
    stand_in(monkeypatch)
    monkeypatch.setenv("HUMMING_COMPILER", "")  # for monkeypatch to put back what was there
    del os.environ["HUMMING_COMPILER"]
    rows = run(tool, tmp_path, tool.Humming())
    assert [r["error"] for r in rows] == [""] * len(rows)
    assert os.environ["HUMMING_COMPILER"] == "nvcc"  # since the other one failed
    assert {r["version"] for r in rows if r["who"] == "humming"} == {"9.9"}


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """`humming`, as far as the tool uses it. Blocks of 2 rows (or pairs) for up to four, else 4; and one if K is 32."""

    def block(columns: int, rows: int) -> int:
        return (2 if rows <= 4 else 4) + (columns == 32)

    class Layer:
        def __init__(self, shape_n: int, shape_k: int, weight_config: Any, num_experts: Any, torch_dtype: Any):
            assert weight_config == {"quant_method": "modelopt", "quant_algo": "nvfp4"}
            assert torch_dtype is torch.bfloat16
            self.shape = ([num_experts] if num_experts else []) + [shape_n, shape_k]
            self.humming_config = SimpleNamespace(to_str=lambda: str(self.shape), shape_k=shape_k)

        def load_from_tensors(self, tensors: dict[str, Tensor]) -> None:
            self.weight = tensors["weight"]
            assert tensors["weight_scale_2"].shape == ((self.shape[0],) if len(self.shape) > 2 else (1,))
            scale = tensors["weight_scale_2"].reshape(self.shape[:-2])
            self.values = NVFP4Weight(self.weight, tensors["weight_scale"], scale).dequantize()

        def transform(self) -> None:
            assert list(self.values.shape) == self.shape

        def __call__(self, x: Tensor, **how: Any) -> Tensor:
            choices = json.loads(how["tuning_config"])
            assert [choice[0] for choice in choices] == [0, *(choice[1] for choice in choices[:-1])]
            if len(self.shape) == 2:
                assert how["compute_config"] == '{"gemm_type": "dense"}'
                return (x.float() @ self.values.T).bfloat16()
            topk, pairs = how["top_k"], len(x) * how["top_k"]
            rows = block(self.shape[-1], pairs)
            result = torch.full((pairs, self.shape[1]), torch.nan)
            assert how["num_tokens_padded"] == len(how["sorted_ids"]) == rows * len(how["expert_ids"])
            for place, pair in enumerate(how["sorted_ids"].tolist()):
                if pair < pairs:
                    result[pair] = self.values[how["expert_ids"][place // rows]] @ x[pair // topk].float()
            return result.bfloat16()

    def choice(config: Any, rows: int, gemm_type: str) -> dict[str, Any]:
        assert gemm_type in ("dense", "indexed")
        return {"block_shape": (block(config.shape_k, rows), 128, 64)}

    def blocks(ids: Tensor, experts: int, gemm_type: str, rows: int) -> Any:
        sorted_ids, of = [], []
        for expert in range(experts):
            pairs = (ids.flatten() == expert).nonzero().flatten().tolist()
            pairs += [ids.numel()] * (-len(pairs) % rows)
            sorted_ids += pairs
            of += [expert] * (len(pairs) // rows)
        return ids, None, torch.tensor(sorted_ids), torch.tensor(of), torch.tensor(len(sorted_ids))

    def activate(config: Any, x: Tensor, activation_type: str, activation_impl: str) -> tuple[Tensor, None, None]:
        assert activation_type == "binary_split" and activation_impl.count("10.0f") == 4
        gate, up = x.float().chunk(2, -1)
        return (torch.nn.functional.silu(gate.clamp(max=10)) * up.clamp(-10, 10)).bfloat16(), None, None

    def repack(weight_bits: int, activation_bits: int, is_weight_packed: bool) -> None:
        raise RuntimeError("Could not locate the NVRTC library in CUDA path")

    kernel = SimpleNamespace(prepare_kernels=lambda *given: [json.loads(text) for text in given[1:3]])
    parts = {
        "humming": {},
        "humming.layer": {"HummingLayer": Layer},
        "humming.ops": {},
        "humming.ops.utils": {"init_humming_launcher": lambda: None},
        "humming.forward": {"may_process_input": activate},
        "humming.testing": {},
        "humming.testing.data": {"generate_moe_tensors": blocks},
        "humming.kernel": {},
        "humming.kernel.humming": {"HummingKernel": kernel},
        "humming.kernel.repack_weight": {"RepackWeightKernel": repack},
        "humming.tune": {"get_heuristics_config": choice},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9" if name == "humming-kernels" else real(name))


def test_global_scales_of_gate_and_up_are_one(tool: Any) -> None:
    make = Maker(torch.device("cpu"))
    first = subjects(tool).nvfp4(make, 3, 16, 32)
    second = subjects(tool).nvfp4(make, 3, 16, 32, scale=first.global_scale)
    assert first.global_scale.shape == (3,) and torch.equal(first.global_scale, second.global_scale)
    assert not torch.equal(first.codes, second.codes)
    assert subjects(tool).nvfp4(make, 16, 32).global_scale.shape == ()
