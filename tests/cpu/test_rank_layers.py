"""tools/rank_layers.py divides a model, sees a bit that differs, and refuses what it cannot do."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dsv4.config import ModelConfig
from dsv4.engine.step import DecodeStep
from dsv4.errors import KernelError
from tools import rank_layers

TINY = (
    "--model",
    "random:tiny",
    "--ranks",
    "1",
    "--device",
    "cpu",
    "--weights",
    "native",
    "--rows",
    "1,3",
    "--context",
    "40",
)


def test_a_rank_has_its_part_and_the_model_stays_whole() -> None:
    whole = ModelConfig.from_name("random:flash")
    part = ModelConfig.from_dict(rank_layers.divided("random:flash", 2))
    for key in rank_layers.SHARED:
        assert getattr(part, key) * 2 == getattr(whole, key)
    assert part.hidden_size == whole.hidden_size and ModelConfig.from_name("random:flash") == whole


def test_one_launch_and_op_by_op_are_compared(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    assert rank_layers.main([*TINY, "--compare"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["differing"] == {"1": 0, "3": 0}
    run, made = DecodeStep.run, []
    monkeypatch.setattr(rank_layers, "DecodeStep", lambda *given, **how: made.append(how) or DecodeStep(*given, **how))
    assert rank_layers.main([*TINY, "--compare", "--longest", "2000"]) == 0
    assert {how["max_length"] for how in made} == {2000} and '"longest": 2000' in capsys.readouterr().out

    def off(step: DecodeStep) -> None:
        run(step)
        if step.layers is not None:
            step.logits[-1, -1] += 1

    monkeypatch.setattr(DecodeStep, "run", off)
    assert rank_layers.main([*TINY, "--compare"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["differing"] == {"1": 12, "3": 12}


def test_what_cannot_be_divided_or_timed_is_said() -> None:
    with pytest.raises(
        SystemExit, match="--ranks 3: random:flash cannot be divided so; num_attention_heads, o_groups, moe_inter"
    ):
        rank_layers.divided("random:flash", 3)
    with pytest.raises(KernelError, match="nothing was measured"):
        rank_layers.main([*TINY])
