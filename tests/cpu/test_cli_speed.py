"""tools/compare_speed.py does what it says: both libraries run the same weights and say the same."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "compare_speed.py"


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("compare_speed", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_write_the_same_text(tool: Any) -> None:
    result = tool.compare("nano", tokens=6, rounds=1, dtype="float32")
    assert result["equal_greedy_tokens"] == result["new_tokens"] == 6
    speeds = result["tokens_per_second"]
    assert result["ratio"] == speeds["dsv4"] / speeds["transformers"] > 0
    assert json.loads(json.dumps(result))["rounds"] == len(result["raw"]["dsv4"]) == 1
