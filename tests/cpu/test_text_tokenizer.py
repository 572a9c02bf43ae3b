"""Ids of prompts: the plain tokenizer's ids where nobody types control tokens, and no typed control token otherwise."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_samples import sample_texts, sample_tokenizer, tokenizer_source, vector
from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import ByteLevel

from dsv4.errors import CheckpointError, RequestError
from dsv4.text.chat import encode_messages, encode_segments
from dsv4.text.segments import Segment
from dsv4.text.texts import PromptTexts
from dsv4.text.tokenizer import _BYTE_OF, Tokenizer
from dsv4.text.tokens import BOS, DSML, EOS, PAD, PROMPT_TOKENS, THINK_CLOSE, THINK_OPEN, USER

LIBRARY = Backend.from_str(tokenizer_source())
CONTROL_IDS = {LIBRARY.token_to_id(token) for token in PROMPT_TOKENS}
# Real text with the joints that a cut at the wrong place would show: spaces, line breaks, punctuation before a tag.
PROSE = st.lists(
    st.sampled_from(
        [
            "You ",
            "are.",
            "\n",
            "\n\n",
            " ",
            "##",
            "<",
            "</",
            ">",
            "｜",
            "23",
            "4567",
            "你好",
            "é",
            "🙂",
            "\0",
            "tool_calls",
        ]
    )
    | st.text(max_size=5),
    max_size=8,
).map("".join)


def library_ids(text: str) -> list[int]:
    return LIBRARY.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("number", [1, 2])
def test_published_prompts_get_the_ids_of_the_plain_tokenizer(number: int) -> None:
    messages, prompt = vector(number)
    segments = encode_segments(messages, texts=sample_texts())
    ids = sample_tokenizer().encode_chat(segments)
    assert ids == library_ids(prompt) == sample_tokenizer().encode_chat(segments, official=True)
    assert sample_tokenizer().decode(ids, skip_special=False) == prompt


@given(PROSE, PROSE, PROSE, PROSE)
def test_without_typed_control_tokens_segments_change_no_id(
    system: str, question: str, thought: str, value: str
) -> None:
    call = {"function": {"name": "f", "arguments": json.dumps({"k": value})}}
    messages = [
        {"role": "system", "content": system, "tools": [{"function": {"name": "f", "description": value}}]},
        {"role": "user", "content": question},
        {"role": "assistant", "reasoning_content": thought, "content": value, "tool_calls": [call]},
        {"role": "tool", "content": question},
    ]
    ids = sample_tokenizer().encode_chat(encode_segments(messages, texts=sample_texts()))
    assert ids == library_ids(encode_messages(messages, texts=sample_texts()))


@given(st.lists(st.sampled_from(PROMPT_TOKENS) | PROSE, max_size=5).map("".join))
def test_typed_control_tokens_are_ordinary_text(typed: str) -> None:
    tokenizer = sample_tokenizer()
    segments = encode_segments([{"role": "user", "content": typed}], texts=sample_texts(), thinking_mode="chat")
    frame = encode_segments([{"role": "user", "content": ""}], texts=sample_texts(), thinking_mode="chat")
    control = [token_id for token_id in tokenizer.encode_chat(segments) if token_id in CONTROL_IDS]
    assert control == tokenizer.encode_chat(frame)
    assert CONTROL_IDS.isdisjoint(tokenizer.encode(typed))
    assert tokenizer.decode(tokenizer.encode(typed)) == typed
    assert tokenizer.encode_chat(segments, official=True) == library_ids("".join(text for text, _ in segments))


def test_a_control_token_cannot_be_put_together_from_two_sides() -> None:
    tokenizer = sample_tokenizer()
    for left, right in ((USER[:4], USER[4:]), ("<", DSML)):
        mixed = tokenizer.encode_chat([Segment(left, False), Segment(right, True), Segment(left, True)])
        assert tokenizer.control_id(USER) not in mixed
        assert tokenizer.decode(mixed) == left + right + left


@given(st.text(max_size=40))
def test_encoding_loses_nothing(text: str) -> None:
    tokenizer = sample_tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == library_ids(text) or any(token in text for token in (*PROMPT_TOKENS, PAD))


def test_bos_is_never_doubled() -> None:
    tokenizer = sample_tokenizer()
    assert LIBRARY.encode(BOS + "a").ids[:2] == [tokenizer.bos_id] * 2  # what the library would do by itself
    assert tokenizer.encode("a", add_bos=True) == [tokenizer.bos_id, *tokenizer.encode("a")]
    assert tokenizer.encode(BOS + "a", add_bos=True, control=True) == tokenizer.encode("a", add_bos=True)
    assert tokenizer.encode(BOS + "a", add_bos=True).count(tokenizer.bos_id) == 1
    assert tokenizer.encode("", add_bos=True) == [tokenizer.bos_id]


def test_lone_surrogates_are_refused_or_replaced() -> None:
    tokenizer = sample_tokenizer()
    for encode in (tokenizer.encode, lambda text, **o: tokenizer.encode_chat([Segment(text, False)], **o)):
        with pytest.raises(RequestError, match=r"U\+D83D at character 2"):
            encode("ab\ud83d")
        assert tokenizer.decode(encode("ab\ud83d", on_surrogate="replace")) == "ab\ufffd"
        assert tokenizer.decode(encode("\ufeff\ud83d\ude00\udc00z", on_surrogate="replace")) == "\ufeff😀\ufffdz"
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.encode_chat([Segment("\ud83d", False)], official=True)


@given(st.lists(st.integers(0, LIBRARY.get_vocab_size() - 1), max_size=12))
def test_decoding_agrees_with_the_library(ids: list[int]) -> None:
    tokenizer = sample_tokenizer()
    for skip in (True, False):
        assert tokenizer.decode(ids, skip_special=skip) == LIBRARY.decode(ids, skip_special_tokens=skip)


def test_markup_of_a_completion_is_kept_whatever_its_flag() -> None:
    tokenizer = Tokenizer(tokenizer_source(special=True))
    text = f"{BOS}{THINK_OPEN}r{THINK_CLOSE}<{DSML}tool_calls>{EOS}"
    ids = tokenizer.encode(text, control=True)
    assert tokenizer.decode(ids) == text.removeprefix(BOS).removesuffix(EOS)
    assert tokenizer.decode(ids, skip_special=False) == text


def test_bytes_of_tokens() -> None:
    tokenizer = sample_tokenizer()
    assert set(ByteLevel.alphabet()) == set(_BYTE_OF) and sorted(_BYTE_OF.values()) == list(range(256))
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode("né🙂"))) == "né🙂".encode()
    assert tokenizer.token_bytes(tokenizer.control_id(USER)) == USER.encode()
    assert tokenizer.vocab_size == LIBRARY.get_vocab_size()
    assert [tokenizer.token_bytes(i) for i in (tokenizer.vocab_size, -1, 1 << 40)] == [b""] * 3


def without(*tokens: str) -> Callable[[dict[str, Any]], None]:
    def edit(spec: dict[str, Any]) -> None:
        spec["added_tokens"] = [entry for entry in spec["added_tokens"] if entry["content"] not in tokens]

    return edit


def edited(edit: Callable[[dict[str, Any]], None]) -> str:
    spec = json.loads(tokenizer_source())
    edit(spec)
    return json.dumps(spec)


def test_a_prompt_that_needs_a_control_token_the_tokenizer_lacks_is_refused() -> None:
    tokenizer = Tokenizer(edited(without("<｜title｜>")))
    titled = [{"role": "user", "content": "<｜title｜>", "task": "title"}]
    with pytest.raises(RequestError, match="<｜title｜>"):
        tokenizer.encode_chat(encode_segments(titled, texts=sample_texts()))
    tokenizer.encode_chat(encode_segments([{"role": "user", "content": "<｜title｜>"}], texts=sample_texts()))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("{", "not a tokenizer.json"),
        ("[]", "not a tokenizer.json"),
        ('{"model": 5}', "not a tokenizer.json"),
        (edited(without(BOS, DSML)), "no control token <｜begin▁of▁sentence｜>; no control token ｜DSML｜"),
        (edited(lambda spec: spec.update(decoder=None)), "decoder is not ByteLevel"),
        (edited(lambda spec: spec.update(normalizer={"type": "Lowercase"})), "normalizer"),
        (edited(lambda spec: spec["model"]["vocab"].pop("Ā")), "1 of 256 bytes"),
        (edited(lambda spec: spec["added_tokens"][0].update(rstrip=True)), "takes neighbouring text with it .rstrip"),
    ],
)
def test_unusable_tokenizers_are_named(tmp_path: Path, source: str, found: str) -> None:
    (tmp_path / "tokenizer.json").write_text(source, encoding="utf-8")
    with pytest.raises(CheckpointError, match=found) as error:
        Tokenizer.from_folder(tmp_path)
    assert "tokenizer.json" in str(error.value)


def test_an_empty_normalizer_is_none(tmp_path: Path) -> None:
    edit = edited(lambda spec: spec.update(normalizer={"type": "Sequence", "normalizers": []}))
    (tmp_path / "tokenizer.json").write_text(edit, encoding="utf-8")
    assert Tokenizer.from_folder(tmp_path).eos_id == sample_tokenizer().eos_id


def test_missing_or_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is missing"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        Tokenizer.from_folder(tmp_path)


def test_the_shipped_model_encodes_a_tool_conversation_as_its_plain_tokenizer_does() -> None:
    nano = Path(__file__).parents[2] / "dsv4" / "models" / "nano"
    tokenizer, library = Tokenizer.from_folder(nano), Backend.from_file(str(nano / "tokenizer.json"))
    messages, _ = vector(1)
    segments = encode_segments(messages, texts=PromptTexts.from_folder(nano), reasoning_effort="max")
    prompt = "".join(text for text, _ in segments)
    ids = tokenizer.encode_chat(segments)
    assert ids == library.encode(prompt, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special=False) == prompt
