"""tools/bench_transformers.py runs transformers at our sizes and survives what does not run."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4.checkpoint.sizes import count
from dsv4.checkpoint.synthetic import shortened
from dsv4.config import ModelConfig

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_transformers.py"
TINY = dataclasses.replace(ModelConfig.from_name("random:tiny"), rope_scaling=None)


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("bench_transformers", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sizes_and_schedule_are_ours(tool: Any) -> None:
    config = shortened(ModelConfig.from_name("random:flash"), 4)
    theirs = tool.config_of(config)
    kinds = ["sliding_attention"] * 2 + ["compressed_sparse_attention", "heavily_compressed_attention"]
    assert theirs.layer_types == kinds and theirs.mlp_layer_types == ["hash_moe"] * 3 + ["moe"]
    assert theirs.qk_rope_head_dim == 64 and theirs.rope_parameters["compress"]["factor"] == 16
    with torch.device("meta"):
        model = tool.DeepseekV4ForCausalLM(theirs)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(count(config).trunk, rel=1e-4)
    assert tool.weight_bytes(config, active=True) == 2 * sum(count(config).active_linears.values())


def test_it_runs_decodes_and_reports(tool: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = tool.bench(TINY, context=40, repeats=2, device="cpu")
    assert json.loads(json.dumps(result))["layers"] == 5
    ran = {row["experts"]: row for row in result["results"] if "us_per_step" in row}
    (best,) = result["best"]
    assert "eager" in ran and best["us_per_step"] == min(row["us_per_step"] for row in ran.values())
    assert best["us_per_layer"] == pytest.approx(best["us_per_step"] / 5, abs=0.01)
    assert len(capsys.readouterr().out.splitlines()) == len(result["results"])


def test_batches_are_measured_one_by_one(tool: Any) -> None:
    result = tool.bench(TINY, 40, 1, "cpu", (1, 3), ("eager",))
    assert [(row["batch"], row["experts"], row["mode"]) for row in result["results"]] == [
        (1, "eager", "eager"),
        (3, "eager", "eager"),
    ]
    assert result["best"] == result["results"]


def test_what_fails_is_said_and_the_rest_goes_on(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = tool.stepper

    def breaks(model: Any, *rest: Any) -> Any:
        if model.config._experts_implementation == "eager":
            raise RuntimeError("cannot\nbe captured")
        return stepper(model, *rest)

    monkeypatch.setattr(tool, "stepper", breaks)
    result = tool.bench(TINY, context=20, repeats=1, device="cpu")
    failed = [row for row in result["results"] if "error" in row]
    assert {row["experts"] for row in failed} >= {"eager"} and result["best"]
    assert failed[-1]["error"] == "RuntimeError: cannot"


def test_masks_and_positions_made_beforehand_give_its_own_logits(tool: Any) -> None:
    model = tool.build(TINY, "cpu").float()
    for context in (10, 23, 24, 60):
        with torch.inference_mode():
            cache = tool.read(model, context, "cpu")
            step, own = tool.stepper(model, cache, context, "cpu"), tool.copy.deepcopy(cache)
            for _ in range(20):
                theirs = model(input_ids=torch.tensor([[7]]), past_key_values=own, use_cache=True).logits
                assert torch.equal(step(), theirs), context


def test_a_sequence_of_a_batch_decodes_as_it_would_alone(tool: Any) -> None:
    model = tool.build(TINY, "cpu").float()
    with torch.inference_mode():
        cache = tool.read(model, 50, "cpu")
        step, alone = tool.stepper(model, cache, 50, "cpu", batch=3), tool.copy.deepcopy(cache)
        token = torch.tensor([[(911 * 2 + 7) % TINY.vocab_size]])
        for _ in range(12):
            theirs = model(input_ids=token, past_key_values=alone, use_cache=True).logits
            logits = step()
            torch.testing.assert_close(logits[2:], theirs, rtol=1e-3, atol=1e-3)
            assert not torch.allclose(logits[0], logits[2], atol=0.1)
