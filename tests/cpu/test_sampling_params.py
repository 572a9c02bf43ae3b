"""SamplingParams and generation_config.json: what is accepted, what it becomes, and every refusal with its words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsv4.engine.defaults import GenerationDefaults
from dsv4.engine.params import SamplingParams
from dsv4.errors import CheckpointError, RequestError

NAN, INF = float("nan"), float("inf")
CONFIG = SimpleNamespace(eos_token_id=1, vocab_size=100)

REFUSED: list[tuple[str, Any, str]] = [
    ("n", 0, "at least 1"),
    ("n", True, "an integer"),
    ("n", 2.0, "an integer"),
    ("temperature", -0.1, "at least 0"),
    ("temperature", NAN, "finite"),
    ("temperature", INF, "finite"),
    ("temperature", "hot", "a number"),
    ("temperature", None, "a number"),
    ("temperature", True, "a number"),
    ("top_p", 0.0, "in (0, 1]"),
    ("top_p", 1.01, "in (0, 1]"),
    ("top_p", NAN, "finite"),
    ("top_k", -2, "at least -1"),
    ("top_k", 1.5, "an integer"),
    ("min_p", -0.1, "in [0, 1]"),
    ("min_p", 1.1, "in [0, 1]"),
    ("max_tokens", 0, "at least 1"),
    ("max_tokens", 1.5, "an integer"),
    ("min_tokens", -1, "at least 0"),
    ("min_tokens", 17, "more than max_tokens = 16"),
    ("stop", "", "non-empty"),
    ("stop", ["a", ""], "non-empty"),
    ("stop", [1], "non-empty string"),
    ("stop", 5, "non-empty string"),
    ("stop_token_ids", [-1], "at least 0"),
    ("stop_token_ids", ["1"], "an integer"),
    ("stop_token_ids", 3, "a list"),
    ("stop_token_ids", "12", "a list"),
    ("seed", 1.0, "an integer"),
    ("seed", 2**64, "in ["),
    ("presence_penalty", 2.1, "in [-2, 2]"),
    ("presence_penalty", NAN, "finite"),
    ("frequency_penalty", -2.1, "in [-2, 2]"),
    ("repetition_penalty", 0.0, "above 0"),
    ("repetition_penalty", INF, "finite"),
    ("logit_bias", {1: 101}, "in [-100, 100]"),
    ("logit_bias", {1: NAN}, "finite"),
    ("logit_bias", {-1: 1.0}, "at least 0"),
    ("logit_bias", {"x": 1.0}, "an integer"),
    ("logit_bias", [1], "must map"),
    ("logprobs", -1, "at least 0"),
    ("prompt_logprobs", "1", "an integer"),
    ("ignore_eos", 1, "true or false"),
    ("skip_special_tokens", "yes", "true or false"),
    ("include_stop_str_in_output", None, "true or false"),
]


@pytest.mark.parametrize(("name", "value", "words"), REFUSED, ids=[f"{n}={v!r}" for n, v, _ in REFUSED])
def test_a_refusal_names_the_field_and_the_range(name: str, value: Any, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert name in str(caught.value) and words in str(caught.value)


def test_every_field_has_a_refusal() -> None:
    assert {f.name for f in dataclasses.fields(SamplingParams)} == {name for name, _, _ in REFUSED}


def test_values_are_brought_to_one_form() -> None:
    p = SamplingParams(
        stop="x", stop_token_ids=[3, 4], top_k=-1, temperature=1e-7, logit_bias={"7": 1}, max_tokens=None
    )
    assert (p.stop, p.stop_token_ids, p.top_k, p.temperature) == (("x",), (3, 4), 0, 0.0)
    assert p.logit_bias == {7: 1.0} and p.max_tokens is None
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    nothing: Any = None
    assert SamplingParams(stop=nothing, stop_token_ids=nothing, logit_bias=nothing) == SamplingParams()
    assert SamplingParams(temperature=1).temperature == 1.0
    for seed in (-(2**63), 2**64 - 1, 0):
        assert SamplingParams(seed=seed).seed == seed


def test_params_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 0.5


def test_defaults_are_vllms() -> None:
    p = SamplingParams()
    assert (p.n, p.temperature, p.top_p, p.top_k, p.min_p, p.max_tokens, p.min_tokens) == (1, 1.0, 1.0, 0, 0.0, 16, 0)
    assert (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) == (0.0, 0.0, 1.0)


def defaults(folder: Path, content: Any) -> GenerationDefaults:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "generation_config.json").write_text(text)
    return GenerationDefaults.of(CONFIG, folder)


def test_the_official_generation_config(tmp_path: Path) -> None:
    official = {
        "_from_model_config": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "transformers_version": "4.46.3",
    }
    found = defaults(tmp_path, official)
    assert found.eos_ids == {1}
    assert found.params() == SamplingParams(temperature=0.6, top_p=0.95)
    assert found.params(temperature=0.1, top_p=None, max_tokens=5) == SamplingParams(
        temperature=0.1, top_p=0.95, max_tokens=5
    )


def test_a_list_of_end_tokens_and_greedy(tmp_path: Path) -> None:
    found = defaults(tmp_path, {"eos_token_id": [7, 8], "do_sample": False, "temperature": 0.7})
    assert found.eos_ids == {1, 7, 8}
    assert found.params().temperature == 0.0


def test_without_a_file_the_config_alone_speaks(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        found = GenerationDefaults.of(CONFIG, folder)
        assert found.eos_ids == {1} and found.params() == SamplingParams()
    assert GenerationDefaults.of(SimpleNamespace(eos_token_id=None, vocab_size=9), None).eos_ids == frozenset()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ([1], "found list"),
        ({"temperature": -1}, "temperature must be"),
        ({"top_p": "x"}, "top_p must be"),
        ({"eos_token_id": 100}, "not a token id in 0..99"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id '2'"),
    ],
)
def test_a_bad_generation_config_is_refused_by_name(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        defaults(tmp_path, content)
    assert "generation_config.json" in str(caught.value) and words in str(caught.value)
