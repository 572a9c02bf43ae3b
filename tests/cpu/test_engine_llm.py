"""LLM on a scripted model with a real tokenizer: prompt forms, text, stop strings, streams, chat, closing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_model import FakeModel
from text_samples import encoding_source, sample_tokenizer, tokenizer_source

import dsv4
from dsv4 import LLM, SamplingParams
from dsv4.errors import CapacityError, KernelError, RequestError
from dsv4.text.stream import Delta
from dsv4.text.tokens import ASSISTANT, BOS, EOS, THINK_CLOSE, THINK_OPEN, USER

TOKENIZER = sample_tokenizer()
GREEDY = SamplingParams(temperature=0, max_tokens=100)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_text(tokenizer_source(), encoding="utf-8")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": TOKENIZER.eos_id, "temperature": 0}))
    (tmp_path / "encoding").mkdir()
    (tmp_path / "encoding" / "encoding_dsv4.py").write_text(encoding_source(TOOLS_TEMPLATE="{tool_schemas}"))
    return tmp_path


@pytest.fixture
def says(folder: Path) -> Callable[..., LLM]:
    """An LLM whose model continues `prompt` (as encoded for completion, or ids) with `answer` and ends."""

    def make(answer: str, prompt: str | list[int] = "Q:", **options: Any) -> LLM:
        ids = TOKENIZER.encode(prompt, add_bos=True, control=True) if isinstance(prompt, str) else prompt
        following = [*TOKENIZER.encode(answer, control=True), TOKENIZER.eos_id]
        model = FakeModel(TOKENIZER.vocab_size, {tuple(ids): following})
        model.config.eos_token_id = TOKENIZER.eos_id
        model.path = folder
        return LLM(model, **options)

    return make


def assert_free(llm: LLM) -> None:
    assert llm.engine.cache.free_slots == llm.engine.limits.max_num_seqs
    assert not llm.engine.requests and not llm.engine.busy


def test_the_public_names() -> None:
    assert {"LLM", "SamplingParams", "load"} <= set(dsv4.__all__)


def test_text_comes_back_without_the_end_token(says: Callable[..., LLM]) -> None:
    with says("Grüße, 你好 🙂!") as llm:
        (out,) = llm.generate("Q:")
        assert len(out.outputs[0].token_ids) == 16 and out.outputs[0].finish_reason == "length"
        assert "Grüße, 你好 🙂!".startswith(out.outputs[0].text.rstrip("\ufffd"))
        (out,) = llm.generate("Q:", GREEDY)
        assert (out.prompt, out.outputs[0].text, out.outputs[0].finish_reason) == ("Q:", "Grüße, 你好 🙂!", "stop")
        assert out.prompt_token_ids == [TOKENIZER.bos_id, *TOKENIZER.encode("Q:")]
        assert out.outputs[0].token_ids[-1] == TOKENIZER.eos_id
        (out,) = llm.generate("Q:", SamplingParams(temperature=0, max_tokens=100, include_stop_str_in_output=True))
        assert out.outputs[0].text == "Grüße, 你好 🙂!"  # the end token is hidden because it is special
        shown = SamplingParams(
            temperature=0, max_tokens=100, include_stop_str_in_output=True, skip_special_tokens=False
        )
        assert llm.generate("Q:", shown)[0].outputs[0].text == "Grüße, 你好 🙂!" + EOS
        assert_free(llm)


def test_prompt_forms_are_the_same_prompt(says: Callable[..., LLM]) -> None:
    ids = TOKENIZER.encode("Q:", add_bos=True)
    with says("yes") as llm:
        forms: list[Any] = ["Q:", BOS + "Q:", ids, tuple(ids), {"prompt": "Q:"}, {"prompt_token_ids": ids}]
        for form in forms:
            (out,) = llm.generate(form, GREEDY)
            assert (out.prompt_token_ids, out.outputs[0].text) == (ids, "yes")
        many = llm.generate([*forms, torch.tensor(ids)], GREEDY)
        assert [o.outputs[0].text for o in many] == ["yes"] * 7
        assert [o.request_id for o in many] == [str(i) for i in range(6, 13)]
        assert llm.generate([], GREEDY) == []


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (7, "int"),
        (None, "NoneType"),
        ({}, "neither prompt_token_ids nor a prompt text"),
        ({"prompt_token_ids": "12"}, "str"),
        (["ok", None], r"prompts\[1\]"),
        ([["a"]], "other than token ids"),
        ([[]], "empty"),
        ("a\ud800", "surrogate"),
    ],
)
def test_prompts_of_no_use_are_refused(says: Callable[..., LLM], prompt: Any, words: str) -> None:
    with says("yes") as llm:
        with pytest.raises(RequestError, match=words):
            llm.generate(prompt, GREEDY)
        assert_free(llm)


def test_one_params_for_all_or_one_each(says: Callable[..., LLM]) -> None:
    with says("abc abc abc") as llm:
        each = [SamplingParams(temperature=0, max_tokens=n) for n in (1, 2, 3)]
        assert [len(o.outputs[0].token_ids) for o in llm.generate(["Q:"] * 3, each)] == [1, 2, 3]
        with pytest.raises(RequestError, match="2 sampling parameters for 3 prompts"):
            llm.generate(["Q:"] * 3, each[:2])
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0)
        assert llm.last_run.requests == 0 and llm.get_metrics().requests == 3


STOPS: list[tuple[dict[str, Any], str, Any]] = [
    ({"stop": "five"}, "one two three four ", "five"),
    ({"stop": ["zzz", "three"]}, "one two ", "three"),
    ({"stop": ["three four", "four"]}, "one two ", "three four"),
    ({"stop": "three", "include_stop_str_in_output": True}, "one two three", "three"),
    ({"stop": "sevenx"}, "one two three four five six seven", None),
    ({"stop": "two", "min_tokens": 100, "max_tokens": 101, "ignore_eos": True}, None, None),
]


@pytest.mark.parametrize(("options", "text", "reason"), STOPS)
def test_stop_strings(says: Callable[..., LLM], options: dict[str, Any], text: str | None, reason: str | None) -> None:
    with says("one two three four five six seven") as llm:
        params = SamplingParams(**{"temperature": 0, "max_tokens": 100, **options})
        answer = llm.generate("Q:", params)[0].outputs[0]
        assert answer.stop_reason == reason
        if text is None:
            assert answer.text.startswith("one two three four five six seven") and len(answer.token_ids) == 101
        else:
            assert (answer.text, answer.finish_reason) == (text, "stop")
            stream = llm.stream("Q:", params)
            assert "".join(stream) == text
        assert_free(llm)


def test_a_stream_gives_whole_characters_early_and_the_same_text(says: Callable[..., LLM]) -> None:
    with says("Grüße, 你好 🙂! How are you?") as llm:
        stream = llm.stream("Q:", GREEDY)
        pieces = [(text, stream.output.finished) for text in stream]
        assert "".join(text for text, _ in pieces) == "Grüße, 你好 🙂! How are you?"
        assert len(pieces) > 5 and not pieces[0][1] and all(text and "�" not in text for text, _ in pieces)
        assert stream.output.outputs[0].finish_reason == "stop"
        assert stream.metrics.generated_tokens == len(stream.output.outputs[0].token_ids)
        assert_free(llm)


@pytest.mark.parametrize("how", ["close", "with", "forget"])
def test_a_stream_that_is_left_early_holds_nothing(says: Callable[..., LLM], how: str) -> None:
    with says("one two three four") as llm:
        stream = llm.stream("Q:", GREEDY)
        next(stream)
        assert llm.engine.busy
        if how == "close":
            stream.close()
        elif how == "with":
            with stream:
                pass
        if how == "forget":
            del stream
        else:
            assert stream.output.outputs[0].finish_reason == "abort"
        assert_free(llm)


def test_a_stream_beside_a_generate_loses_nothing(says: Callable[..., LLM]) -> None:
    with says("one two three four") as llm:
        stream = llm.stream("Q:", GREEDY)
        first = next(stream)
        assert llm.generate("Q:", GREEDY)[0].outputs[0].text == "one two three four"
        assert first + "".join(stream) == "one two three four"


def test_chat_encodes_answers_and_parses(says: Callable[..., LLM]) -> None:
    prompt = f"{BOS}{USER}2+3?{ASSISTANT}{THINK_OPEN}"
    with says(f"easy{THINK_CLOSE}5", prompt) as llm:
        messages = [{"role": "user", "content": "2+3?"}]
        (out,) = llm.chat(messages, GREEDY)
        assert out.prompt == prompt and out.prompt_token_ids == TOKENIZER.encode(prompt, control=True)
        assert out.outputs[0].text == f"easy{THINK_CLOSE}5"
        message = out.outputs[0].message
        assert message is not None
        assert (message["reasoning_content"], message["content"], message["tool_calls"]) == ("easy", "5", [])
        assert len(llm.chat([messages, messages], GREEDY)) == 2
        deltas = list(llm.stream_chat(messages, GREEDY))
        assert "".join(d.text for d in deltas if d.kind == "reasoning") == "easy"
        assert "".join(d.text for d in deltas if d.kind == "content") == "5"
        assert_free(llm)


def test_chat_without_thinking(says: Callable[..., LLM]) -> None:
    prompt = f"{BOS}{USER}2+3?{ASSISTANT}{THINK_CLOSE}"
    with says("5", prompt) as llm:
        messages = [{"role": "user", "content": "2+3?"}]
        message = llm.chat(messages, GREEDY, thinking=False)[0].outputs[0].message
        assert message is not None and message["content"] == "5" and message["reasoning_content"] == ""
        assert list(llm.stream_chat(messages, GREEDY, thinking=False)) == [Delta("content", "5")]


def test_a_control_token_typed_by_a_user_is_ordinary_text(says: Callable[..., LLM]) -> None:
    with says("x") as llm:
        (out,) = llm.chat([{"role": "user", "content": f"a{ASSISTANT}b"}], SamplingParams(temperature=0, max_tokens=1))
        assert out.prompt_token_ids.count(TOKENIZER.control_id(ASSISTANT)) == 1


def test_a_model_without_a_tokenizer_takes_ids_alone() -> None:
    with LLM(FakeModel()) as llm:
        (out,) = llm.generate([5, 6], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=1))
        answer = out.outputs[0]
        assert answer.text == "" and len(answer.token_ids) == 4 and answer.logprobs is not None
        assert answer.logprobs[0][answer.token_ids[0]].decoded_token is None
        for call in (
            lambda: llm.generate("text"),
            lambda: llm.stream("text"),
            lambda: llm.stream([5, 6]),
            lambda: llm.chat([{"role": "user", "content": "hi"}]),
            lambda: llm.generate([5], SamplingParams(stop="x")),
        ):
            with pytest.raises(RequestError, match="tokenizer"):
                call()
        assert_free(llm)


def test_logprobs_carry_the_text_of_tokens(says: Callable[..., LLM]) -> None:
    with says("one two") as llm:
        answer = llm.generate("Q:", SamplingParams(temperature=0, logprobs=2, max_tokens=50))[0].outputs[0]
        assert answer.logprobs is not None
        texts = [c[t].decoded_token or "" for t, c in zip(answer.token_ids, answer.logprobs, strict=True)]
        assert "".join(texts) == "one two" + EOS


def test_a_failing_request_raises_and_frees_the_others(says: Callable[..., LLM]) -> None:
    with says("one two three four") as llm:
        model: Any = llm.model
        model.poison = {len(TOKENIZER.encode("Q:", add_bos=True)) + 2: float("nan")}
        with pytest.raises(KernelError, match="request 1, step 2"):
            llm.generate([[5] * 40, "Q:", [6] * 40], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
        assert_free(llm)
        with pytest.raises(KernelError, match="step 2"):
            list(llm.stream("Q:", GREEDY))
        model.poison = {}
        assert llm.generate("Q:", GREEDY)[0].outputs[0].text == "one two three four"


def test_one_prompt_too_long_refuses_the_call_before_anything_runs(says: Callable[..., LLM]) -> None:
    with says("one", max_model_len=30) as llm:
        with pytest.raises(RequestError, match=r"context holds 30 tokens.*the prompt has 29 and max_tokens is 5 \(34"):
            llm.generate(["Q:", [5] * 29], SamplingParams(temperature=0, max_tokens=5))
        assert_free(llm)
        model: Any = llm.model
        assert model.batches == []


def test_keyboard_interrupt_frees_everything(says: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    with says("one two three four") as llm:
        calls, forward = [], llm.model.forward

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return forward(*args, **kwargs)

        monkeypatch.setattr(llm.model, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["Q:", "Q:"], GREEDY)
        assert_free(llm)


def test_sizes(says: Callable[..., LLM]) -> None:
    longest = 256  # the fake model's
    assert says("x").engine.limits.max_model_len == longest
    assert says("x", max_num_seqs=3).engine.limits.max_total_tokens == 3 * longest
    assert says("x", max_total_tokens=100).engine.limits.max_model_len == 100
    with pytest.raises(RequestError, match="257 is more than the model's 256"):
        says("x", max_model_len=257)
    with pytest.raises((RequestError, CapacityError), match="max_num_seqs"):
        says("x", max_num_seqs=0)


def test_closing(says: Callable[..., LLM]) -> None:
    llm = says("one two three")
    stream = llm.stream("Q:", GREEDY)
    next(stream)
    llm.close()
    llm.close()
    for call in (lambda: llm.generate("Q:"), lambda: llm.chat([{"role": "user", "content": "x"}]), lambda: llm.model):
        with pytest.raises(RequestError, match="closed"):
            call()
