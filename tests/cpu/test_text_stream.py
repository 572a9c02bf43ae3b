"""Streams: pieces of any size give what the whole gives, and nothing is shown that has to be taken back."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_text_tools import BLOCK, CALL, CALLS, PLAIN, TOLERANT
from text_samples import sample_tokenizer

from dsv4.text.dsml import BLOCK_CLOSE, BLOCK_OPEN, CALL_CLOSE, CALL_OPEN, PARAM_CLOSE, PARAM_OPEN
from dsv4.text.stream import CompletionSplitter, Delta, Detokenizer, StopStrings
from dsv4.text.tokens import DSML, EOS, THINK_CLOSE, THINK_OPEN
from dsv4.text.tools import parse_completion, render_tool_calls

MODES = st.sampled_from(["thinking", "chat"])
CUTS = st.lists(st.integers(0, 400), max_size=12) | st.just(list(range(400)))
# Bits a model could string together, right or wrong.
BITS = (
    *(BLOCK, CALL, BLOCK_OPEN, BLOCK_CLOSE, CALL_OPEN, CALL_CLOSE, PARAM_OPEN, PARAM_CLOSE),
    *(THINK_OPEN, THINK_CLOSE, DSML, EOS, "<", "</", "\n", "\n\n", " ", "x", "你", "tool_calls>", "<think", "<｜end"),
    *(' name="f">', ' name="k" string="true">', ' name="k" string="false">', "5", f"{BLOCK_OPEN}\n{CALL_OPEN}"),
)
NOISE = st.lists(st.sampled_from(BITS) | st.text(max_size=3), max_size=12).map("".join)


def pieces(text: str, cuts: Sequence[int]) -> list[str]:
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def collect(deltas: Sequence[Delta]) -> dict[str, Any]:
    return {
        "role": "assistant",
        "reasoning_content": "".join(delta.text for delta in deltas if delta.kind == "reasoning"),
        "content": "".join(delta.text for delta in deltas if delta.kind == "content"),
        "tool_calls": [delta.call for delta in deltas if delta.kind == "tool_call"],
    }


def stream(parts: Sequence[str], mode: str) -> list[Delta]:
    splitter = CompletionSplitter(mode, call_ids=lambda: "id")
    return [delta for part in parts for delta in splitter.feed(part)] + splitter.finish()


@given(NOISE, CUTS, MODES)
def test_any_pieces_of_any_text_give_the_message_of_the_whole(text: str, cuts: list[int], mode: str) -> None:
    deltas = stream(pieces(text, cuts), mode)
    assert collect(deltas) == parse_completion(text, mode, call_ids=lambda: "id")
    assert all(delta.text or delta.call for delta in deltas)


@pytest.mark.parametrize(("text", "content", "names"), TOLERANT)
def test_right_and_wrong_completions_character_by_character(text: str, content: str, names: list[str]) -> None:
    whole = collect(stream(text, "chat"))
    assert (whole["content"], [call["function"]["name"] for call in whole["tool_calls"]]) == (content, names)
    assert whole == collect(stream([text], "chat"))


def test_a_completion_cut_off_anywhere_shows_no_tag() -> None:
    text = f"answer\n\n{BLOCK}"
    for cut in range(len(text)):
        message = collect(stream([text[:cut]], "chat"))
        assert message == parse_completion(text[:cut], "chat") and DSML not in message["content"]
        assert message["tool_calls"] == []


@given(PLAIN, PLAIN, CALLS, CUTS, MODES, st.integers(0, 400))
def test_tags_of_right_completions_are_never_shown(
    reasoning: str, content: str, calls: list[dict[str, Any]], cuts: list[int], mode: str, cut_off: int
) -> None:
    text = (reasoning + THINK_CLOSE if mode == "thinking" else "") + content
    text += "\n\n" + render_tool_calls(calls) if calls else ""
    deltas = stream(pieces(text + EOS, cuts), mode)
    whole = collect(deltas)
    assert whole["content"] == content and len(whole["tool_calls"]) == len(calls)
    assert whole["reasoning_content"] == (reasoning if mode == "thinking" else "")
    cut = collect(stream(pieces(text[:cut_off], cuts), mode))  # generation stopped by a length limit
    assert DSML not in cut["content"] and DSML not in cut["reasoning_content"]
    assert cut["tool_calls"] in ([], whole["tool_calls"])


def test_text_flows_as_soon_as_it_is_certain() -> None:
    splitter = CompletionSplitter(call_ids=lambda: "id")
    seen = [
        [(delta.kind, delta.text) for delta in splitter.feed(part)]
        for part in ("<", "think>", "a<", "b", "</thi", "nk>", "c", "\n", "\n<", "d\n\n<", DSML, "tool_calls>\n")
    ]
    assert seen[:4] == [[], [], [("reasoning", "a")], [("reasoning", "<b")]]
    assert seen[4:8] == [[], [], [("content", "c")], []]
    assert seen[8:] == [[], [("content", "\n\n<d")], [], []]
    assert splitter.feed(f"{CALL}\n") == []
    (call,) = splitter.feed(BLOCK_CLOSE)
    assert call.kind == "tool_call" and call.call == {
        "id": "id",
        "type": "function",
        "function": {"name": "f", "arguments": '{"a": "x"}'},
    }
    assert splitter.feed(f"\n{EOS}ignored") == splitter.finish() == []


def complete_first(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The definition of StopStrings, by trying every length."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(st.text("ab\n", max_size=20), st.lists(st.text("ab\n", max_size=4), max_size=3), CUTS, st.booleans())
def test_stop_strings(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    stopper = StopStrings(stops, include_stop=include)
    out = "".join([stopper.feed(part) for part in pieces(text, cuts)]) + stopper.finish()
    before, stop = complete_first(text, stops)
    assert (out, stopper.matched) == (before + (stop or "" if include else ""), stop)


def test_the_stop_string_that_is_complete_first_wins() -> None:
    for stops, text, before, matched in (
        (["abcd", "bc"], "abcd", "a", "bc"),
        (["b", "ab"], "xab", "x", "ab"),
        (["c", "b"], "abc", "a", "b"),
    ):
        stopper = StopStrings(stops)
        assert (stopper.feed(text), stopper.matched) == (before, matched)


def test_stop_strings_hold_back_no_more_than_they_must() -> None:
    stopper = StopStrings(["stop", "top!"])
    assert [stopper.feed(part) for part in ("no s", "top", " sto", "p")] == ["no ", "", "", ""]
    assert stopper.matched == "stop"
    other = StopStrings(["stop!"])
    assert [other.feed("a sto"), other.feed("x st"), other.finish()] == ["a ", "stox ", "st"]


@given(st.lists(st.integers(0, sample_tokenizer().vocab_size), max_size=20), CUTS, st.booleans())
def test_detokenizer_gives_the_text_of_all_ids(ids: list[int], cuts: list[int], skip: bool) -> None:
    detokenizer = Detokenizer(sample_tokenizer(), skip_special=skip)
    edges = [0, *sorted(cut for cut in cuts if cut < len(ids)), len(ids)]
    text = "".join(detokenizer.feed(ids[a:b]) for a, b in pairwise(edges)) + detokenizer.finish()
    assert text == sample_tokenizer().decode(ids, skip_special=skip)


def test_detokenizer_waits_for_whole_characters() -> None:
    tokenizer = sample_tokenizer()
    token_of = {tokenizer.token_bytes(token_id): token_id for token_id in range(tokenizer.vocab_size)}
    ids = [token_of[bytes([byte])] for byte in b"a\xc3\xa9\xf0\x9f"]
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.feed([token_id]) for token_id in ids] == ["a", "", "é", "", ""]
    assert detokenizer.finish() == "\ufffd"
