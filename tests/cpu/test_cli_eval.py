"""`dsv4 eval`, `dsv4 compare` and the named settings, against sums and norms taken the long way."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_helpers import Program, write_model
from fake_model import FakeModel
from hypothesis import given
from hypothesis import strategies as st
from text_samples import sample_tokenizer

from dsv4 import load
from dsv4.checkpoint.load import load_model_weights
from dsv4.cli.compare import compare_models
from dsv4.cli.perplexity import Score, encode_text, negative_log_likelihood, windows
from dsv4.cli.settings import FORMS, NAMED, Setting, load_setting, parse_setting, recast
from dsv4.errors import KernelError, RequestError
from dsv4.model import Model
from dsv4.quant.weights import Weight

TOKENIZER = sample_tokenizer()
TEXT = "The tool_calls block holds one invoke per call.\nEvery parameter has a name, « üñí », 你好.\n" * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights without a tokenizer, unquantised."""
    return write_model(tmp_path_factory.mktemp("bare"), "bf16", tokenizer=False)


@pytest.fixture(scope="module")
def tiny() -> Model:
    return load("random:tiny", dtype="float32")


@pytest.fixture
def dsv4(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Program:
    for name in [name for name in os.environ if name.startswith("DSV4_")]:
        monkeypatch.delenv(name)
    return Program(capsys)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.md"
    path.write_text(TEXT, encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------- perplexity


@given(st.integers(2, 200), st.integers(1, 50), st.integers(1, 50))
def test_windows_score_every_token_once_with_enough_context(total: int, context: int, stride: int) -> None:
    if stride > context:
        with pytest.raises(RequestError, match="stride"):
            windows(total, context, stride)
        return
    scored = []
    for begin, first, end in windows(total, context, stride):
        assert 0 <= begin < first < end <= total
        assert end - 1 - begin <= context
        assert first - begin >= min(first, context - stride + 1)
        scored += range(first, end)
    assert scored == list(range(1, total))


@pytest.mark.parametrize(("context", "stride"), [(300, 300), (300, 150), (64, 32), (10, 10), (7, 3)])
def test_nll_is_the_sum_taken_window_by_window(tiny: Model, context: int, stride: int) -> None:
    ids = [(37 * i * i + 11 * i) % tiny.config.vocab_size for i in range(150)]
    expected = 0.0
    for i in range(1, len(ids)):
        at = (i - 1) // stride * stride + 1  # the window that scores i starts its targets here
        end = min(at + stride, len(ids))
        begin = max(0, end - 1 - context)
        if i == at:
            truth = tiny.logits(ids[begin : end - 1]).double().log_softmax(-1)
        expected -= truth[i - 1 - begin, ids[i]].item()
    found = negative_log_likelihood(tiny, ids, context=context, stride=stride)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    model: Any = FakeModel(50)
    model.row = lambda history: torch.zeros(50)
    nats = negative_log_likelihood(model, list(range(40)), context=16, stride=8)
    score = Score(nats, 39, 78)
    assert score.perplexity == pytest.approx(50, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(math.log2(50) / 2, rel=1e-5)
    both = score + Score(0.0, 39, 78)
    assert (both.nats_per_token, both.bits_per_byte) == (score.nats_per_token / 2, score.bits_per_byte / 2)


def test_a_loss_that_is_not_finite_stops() -> None:
    model: Any = FakeModel(50)
    model.poison = {10: math.nan}
    with pytest.raises(KernelError, match="not finite in the window of tokens"):
        negative_log_likelihood(model, list(range(40)), context=16, stride=8)


def test_text_is_scored_behind_bos_and_bytes_are_those_scored() -> None:
    ids, text_bytes = encode_text(TOKENIZER, TEXT, None)
    assert ids[0] == TOKENIZER.bos_id and text_bytes == len(TEXT.encode())
    ids, text_bytes = encode_text(TOKENIZER, TEXT, 10)
    assert len(ids) == 11 and TEXT.encode().startswith(TOKENIZER.decode_bytes(ids[1:]))
    assert text_bytes == len(TOKENIZER.decode_bytes(ids[1:]))
    typed = "<｜User｜>"
    assert TOKENIZER.control_id(typed) not in encode_text(TOKENIZER, typed, None)[0]
    assert TOKENIZER.control_id(typed) in encode_text(TOKENIZER, typed, None, control=True)[0]
    with pytest.raises(RequestError, match="no text"):
        encode_text(TOKENIZER, "", None)


def test_eval_prints_a_line_per_file_and_the_total(dsv4: Program, folder: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Short.")
    done = dsv4("eval", text, other, "-m", folder, "--context", 64)
    lines = done.out.splitlines()
    assert done.code == 0 and len(lines) == 3 and lines[2].startswith("total: ")
    document = json.loads(dsv4("eval", text, other, "-m", folder, "--context", 64, "--json").out)
    model, ids = load(folder), TOKENIZER.encode(TEXT, add_bos=True)
    nats = negative_log_likelihood(model, ids, context=64, stride=32)
    found = document["files"][str(text)]
    assert found["nats_per_token"] == pytest.approx(nats / (len(ids) - 1), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-6)
    assert document["total"]["tokens"] == sum(f["tokens"] for f in document["files"].values())
    assert f"{found['bits_per_byte']:.4f} bits/byte" in lines[0]


def test_eval_table_has_a_row_per_setting(dsv4: Program, folder: Path, bare: Path, text: Path) -> None:
    options = ["-m", folder, "--limit", 40, "--context", 32]
    done = dsv4("eval", text, *options, "--table")
    rows = [line.split("|") for line in done.out.splitlines() if line.startswith("|")]
    assert [row[1].strip() for row in rows[2:]] == list(NAMED)
    assert len({len(row) for row in rows}) == 1 and "40 tokens" in done.out
    chosen = ["--setting", "nvfp4-w4a16", "--setting", "act=fp8,kv_quant=off", "--setting", "bf16"]
    document = json.loads(dsv4("eval", text, *options, "--table", *chosen, "--master", bare, "--json").out)
    names = [(row["name"], row["model"]) for row in document["rows"]]
    assert names == [("nvfp4-w4a16", str(folder)), ("act=fp8,kv_quant=off", str(folder)), ("bf16", str(bare))]
    plain = json.loads(dsv4("eval", text, *options, "--json").out)
    assert document["rows"][0]["total"] == plain["total"]  # the stored weights are what this row wants already
    exact = dsv4("eval", text, *options, "--no-kv-quant", "--no-index-quant", "--json", "-m", folder)
    assert document["rows"][2]["total"] != json.loads(exact.out)["total"]  # the master was read


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["no-such-file"], 2, "no-such-file"),
        ([], 2, "files"),
        (["TEXT", "--context", "5000"], 1, "context = 5000 is more than the model's 4096"),
        (["TEXT", "--context", "8", "--stride", "9"], 1, "stride must be between 1 and context = 8"),
        (["TEXT", "--table", "--setting", "wild"], 1, "no setting is called 'wild'"),
        (["TEXT", "-m", "random:tiny"], 1, "no tokenizer.json"),
        (["BINARY"], 1, "not UTF-8"),
        (["EMPTY"], 1, "no text to score"),
    ],
)
def test_eval_refusals(
    dsv4: Program, folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    args: list[str], code: int, words: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("DSV4_MODEL", str(folder))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").write_text("")
    paths = {"TEXT": text, "BINARY": tmp_path / "binary", "EMPTY": tmp_path / "empty"}
    done = dsv4("eval", *(paths.get(arg, arg) for arg in args))
    assert done.code == code and words in done.err and done.out == ""


# --------------------------------------------------------------------------------------------------------- settings


def test_settings_are_names_pairs_or_both() -> None:
    assert parse_setting("") == Setting()
    assert parse_setting("official") == Setting("official", "fp8")
    assert parse_setting("act=nvfp4,kv_quant=off") == Setting(act="nvfp4", kv_quant=False)
    assert parse_setting("bf16,dtype=float32") == Setting("bf16", "bf16", "float32", False, False)
    for setting in NAMED.values():
        assert parse_setting(str(setting)) == setting


@pytest.mark.parametrize(
    ("text", "words"),
    [("fast", "names are bf16, official"), ("speed=9", "has no 'speed'; it has weights, act"),
     ("act=fp3", "choose one of bf16, fp8, nvfp4"), ("kv_quant=maybe", "choose one of on, off")],
)  # fmt: skip
def test_unknown_settings_are_refused_with_the_choices(text: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_setting(text)
    assert words in str(caught.value)


def test_recast_gives_the_formats_it_promises_and_keeps_what_fits(folder: Path) -> None:
    config, weights, _ = load_model_weights(folder)
    formats = {
        form: {name: w.format for name, w in recast(config, weights, FORMS[form]).items() if isinstance(w, Weight)}
        for form in FORMS
    }
    assert set(formats["bf16"].values()) == {"bf16"}
    for name, found in formats["official"].items():
        expert = ".experts." in name
        assert (found == "mxfp4") == expert and found in ("mxfp4", "fp8", "bf16")
    kept = recast(config, weights, FORMS["nvfp4-experts"])
    assert all(kept[name] is weights[name] for name in weights)
    error = []
    for name, weight in recast(config, weights, FORMS["official"]).items():
        if isinstance(weight, Weight):
            before = weights[name].dequantize()  # type: ignore[union-attr]
            error.append((weight.dequantize() - before).norm() / before.norm())
    assert max(error) < 0.2 and min(error) == 0


def test_load_setting_is_load_where_both_can_say_it(folder: Path) -> None:
    ids = list(range(20))
    for setting, options in (
        (Setting(), {}),
        (Setting(act="nvfp4", dtype="float32"), {"act": "nvfp4", "dtype": "float32"}),
        (
            Setting("nvfp4", kv_quant=False, index_quant=False),
            {"weights": "nvfp4", "kv_quant": False, "index_quant": False},
        ),
    ):
        expected = load(folder, **options).logits(ids)
        assert torch.equal(load_setting(str(folder), setting).logits(ids), expected)


# ---------------------------------------------------------------------------------------------------------- compare


def test_a_model_beside_itself_does_not_differ(tiny: Model) -> None:
    result = compare_models(tiny, tiny, list(range(1, 40)), 5)
    names = [f"layers.{i}.{site}" for i in range(len(tiny.config.layers)) for site in ("attn", "ffn")]
    assert list(result.layers) == names and set(result.layers.values()) == {0.0}
    assert (result.max_logit_delta, result.top1_agreement, result.mean_kl) == (0.0, 1.0, 0.0)
    assert result.first_difference is None and result.tokens_a == result.tokens_b
    assert result.prompt_tokens == 39


def test_the_figures_are_those_of_the_logits(tiny: Model) -> None:
    other, ids = load("random:tiny", dtype="float32", act="nvfp4"), list(range(1, 60))
    result = compare_models(tiny, other, ids, 8)
    a, b = tiny.logits(ids).double(), other.logits(ids).double()
    assert result.max_logit_delta == pytest.approx((a - b).abs().max().item(), rel=1e-4)
    assert result.top1_agreement == pytest.approx((a.argmax(-1) == b.argmax(-1)).double().mean().item())
    p, q = a.softmax(-1), b.softmax(-1)
    assert result.mean_kl == pytest.approx((p * (p.log() - q.log())).sum(-1).mean().item(), rel=1e-3)
    assert all(0 < error < 1 for error in result.layers.values())
    at = result.first_difference
    assert at is not None and result.tokens_a[:at] == result.tokens_b[:at]
    assert result.tokens_a[at : at + 1] != result.tokens_b[at : at + 1]


def test_models_of_other_shape_are_refused(tiny: Model) -> None:
    other: Any = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=1, vocab_size=2, hidden_size=3))
    with pytest.raises(RequestError, match="differ in"):
        compare_models(tiny, other, [1], 1)


def test_compare_two_settings(dsv4: Program, folder: Path) -> None:
    done = dsv4("compare", folder, "--a", "act=bf16", "--b", "act=nvfp4", "-p", "The tool", "--max-tokens", 4)
    assert done.code == 0 and "layers.4.ffn" in done.out and "KL" in done.out and "act=nvfp4" in done.out
    same = json.loads(dsv4("compare", folder, "--json", "--max-tokens", 3).out)
    assert same["first_difference"] is None and same["max_logit_delta"] == 0.0 and len(same["tokens_a"]) <= 3
    assert same["a"]["setting"] == same["b"]["setting"] and same["prompt_tokens"] > 10


def test_compare_two_checkpoints(dsv4: Program, folder: Path, bare: Path) -> None:
    document = json.loads(dsv4("compare", folder, "--model-b", bare, "--json", "--max-tokens", 2).out)
    assert document["b"]["model"] == str(bare) and 0 < document["layers"]["layers.0.ffn"] < 1
    seeded = json.loads(dsv4("compare", "random:tiny", "--prompt-ids", "5,6,7", "--json", "--max-tokens", 2).out)
    assert seeded["prompt_tokens"] == 3
    assert "joined by commas" in dsv4("compare", "random:tiny", "--prompt-ids", "5;6").err
