"""Prompts against the published vectors and the worked examples of the format."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_samples import encoding_source, sample_texts, vector

from dsv4.errors import CheckpointError, RequestError
from dsv4.text.chat import encode_messages, encode_segments
from dsv4.text.texts import PromptTexts
from dsv4.text.tokens import ASSISTANT, BOS, EOS, LATEST_REMINDER, TASKS, THINK_CLOSE, THINK_OPEN, USER

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+3?"},
    {"role": "assistant", "reasoning_content": "R1", "content": "5"},
    {"role": "user", "content": "times 4?"},
]
ADD = {"type": "function", "function": {"name": "add", "description": "größer", "parameters": {"type": "object"}}}


def encode(messages: list[dict[str, Any]], **options: Any) -> str:
    return encode_messages(messages, texts=sample_texts(), **options)


def user(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


def call(call_id: str, name: str = "add", arguments: str = '{"a": 5}') -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(call_id: str, content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


@pytest.mark.parametrize("number", [1, 2])
def test_published_vectors_byte_for_byte(number: int) -> None:
    messages, expected = vector(number)
    assert encode(messages).encode() == expected.encode()


def test_request_level_tools_equal_tools_on_the_system_message() -> None:
    messages, expected = vector(1)
    tools = messages[0].pop("tools")
    assert encode(messages, tools=tools) == expected
    section = expected[expected.index("\n\n## Tools") : expected.index(USER)]
    assert encode([user("hi")], tools=tools) == f"{BOS}{section}{USER}hi{ASSISTANT}{THINK_OPEN}"
    with pytest.raises(RequestError, match="give them once"):
        encode([{"role": "system", "content": "", "tools": tools}, user("hi")], tools=tools)


def test_worked_examples() -> None:
    head = f"{BOS}Be brief.{USER}2+3?{ASSISTANT}"
    tail = f"5{EOS}{USER}times 4?{ASSISTANT}"
    assert encode(TALK, thinking_mode="chat") == f"{head}{THINK_CLOSE}{tail}{THINK_CLOSE}"
    assert encode(TALK) == f"{head}{THINK_CLOSE}{tail}{THINK_OPEN}"
    assert encode(TALK, drop_thinking=False) == f"{head}{THINK_OPEN}R1{THINK_CLOSE}{tail}{THINK_OPEN}"
    with_tools = encode([TALK[0], *TALK[1:]], tools=[ADD])
    assert with_tools.endswith(f"{USER}2+3?{ASSISTANT}{THINK_OPEN}R1{THINK_CLOSE}{tail}{THINK_OPEN}")
    assert '\n\n{"name": "add", "description": "größer", "parameters": {"type": "object"}}\n\n' in with_tools


def test_worked_example_of_a_tool_turn() -> None:
    messages = [
        user("go", tools=[ADD]),
        {"role": "assistant", "reasoning_content": "R", "tool_calls": [call("1")]},
        result("1", "10"),
    ]
    assert encode(messages) == (
        f"{BOS}{USER}go{ASSISTANT}<think>R</think>\n\n"
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="add">\n'
        '<｜DSML｜parameter name="a" string="false">5</｜DSML｜parameter>\n'
        f"</｜DSML｜invoke>\n</｜DSML｜tool_calls>{EOS}{USER}<tool_result>10</tool_result>{ASSISTANT}<think>"
    )


def test_results_follow_the_order_of_the_calls_and_share_one_user_turn() -> None:
    calls = {"role": "assistant", "tool_calls": [call("x"), call("y"), call("z")]}
    messages = [user("go"), calls, result("z", "Z"), result("x", "X"), user("and?"), result("y", "Y"), user("so?")]
    turn = "<tool_result>X</tool_result>\n\n<tool_result>Y</tool_result>\n\nand?\n\n<tool_result>Z</tool_result>\n\nso?"
    assert encode(messages).endswith(f"{EOS}{USER}{turn}{ASSISTANT}{THINK_OPEN}")
    unknown = [calls, result("y", "Y"), result("?", "U"), result("x", "X")]  # an unknown id counts as the first call
    assert "U</tool_result>\n\n<tool_result>X</tool_result>\n\n<tool_result>Y<" in encode(unknown)


def test_parts_are_joined_by_a_blank_line_and_others_are_named() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}, {"type": "text", "text": "b"}]
    joined = "a\n\n[Unsupported image_url]\n\nb"
    assert f"{USER}{joined}{ASSISTANT}" in encode([user(parts)])
    assert f"<tool_result>{joined}</tool_result>" in encode([result("1", parts)])
    assert encode([{"role": "system", "content": parts}]) == BOS + joined
    blocks = [{"type": "tool_result", "tool_use_id": "1", "content": parts}, {"type": "text", "text": "c"}]
    assert f"{USER}<tool_result>{joined}</tool_result>\n\nc{ASSISTANT}" in encode(
        [{"role": "user", "content_blocks": blocks}]
    )


def test_developer_is_a_user_turn_that_goes_with_old_reasoning() -> None:
    developer = {"role": "developer", "content": "D", "response_format": {"type": "ü"}}
    assert encode([developer]) == f'{BOS}{USER}D\n\n## Format\n{{"type": "ü"}}{ASSISTANT}{THINK_OPEN}'
    assert encode([developer, user("q")]) == f"{BOS}{USER}q{ASSISTANT}{THINK_OPEN}"
    assert "D" in encode([developer, user("q")], drop_thinking=False)
    assert "D" in encode([developer, user("q")], thinking_mode="chat")


def test_latest_reminder() -> None:
    reminder = {"role": "latest_reminder", "content": "today"}
    assert encode([reminder, user("q")]) == f"{BOS}{LATEST_REMINDER}today{USER}q{ASSISTANT}{THINK_OPEN}"
    assert encode([user("q"), reminder]) == f"{BOS}{USER}q{ASSISTANT}{THINK_OPEN}{LATEST_REMINDER}today"


@pytest.mark.parametrize("task", ["query", "authority", "domain", "read_url"])
@pytest.mark.parametrize("mode", ["thinking", "chat"])
def test_quick_instruction_follows_the_user_text_and_its_answer_has_no_reasoning(task: str, mode: str) -> None:
    asked = [user("q", task=task)]
    assert encode(asked, thinking_mode=mode) == f"{BOS}{USER}q{TASKS[task]}"
    answered = [*asked, {"role": "assistant", "content": "A", "reasoning_content": "never"}]
    assert encode(answered, thinking_mode=mode) == f"{BOS}{USER}q{TASKS[task]}A{EOS}"
    assert encode([*asked, user("r")], thinking_mode="chat") == f"{BOS}{USER}q{USER}r{ASSISTANT}{THINK_CLOSE}"


def test_action_and_title_tasks() -> None:
    for mode, opening in (("thinking", THINK_OPEN), ("chat", THINK_CLOSE)):
        prompt = encode([user("q", task="action")], thinking_mode=mode)
        assert prompt == f"{BOS}{USER}q{ASSISTANT}{opening}<｜action｜>"
    titled = [user("q"), {"role": "assistant", "content": "a", "task": "title"}]
    assert encode(titled, thinking_mode="chat") == f"{BOS}{USER}q{ASSISTANT}{THINK_CLOSE}a{EOS}<｜title｜>"


def test_effort_preamble_stands_behind_bos_in_thinking_mode_only() -> None:
    assert encode(TALK, reasoning_effort="high") == encode(TALK)
    assert encode(TALK, reasoning_effort="max") == encode(TALK).replace(BOS, BOS + "Think hard.\n\n")
    assert encode(TALK, thinking_mode="chat", reasoning_effort="max") == encode(TALK, thinking_mode="chat")
    later = PromptTexts.from_source(
        encoding_source(REASONING_EFFORT_PROMPTS={"low": "", "high": "H", "max": "M"}, DEFAULT_REASONING_EFFORT="low"),
        "later",
    )
    for effort, text in ((None, ""), ("low", ""), ("high", "H"), ("max", "M")):
        assert encode_messages(TALK, texts=later, reasoning_effort=effort) == encode(TALK).replace(BOS, BOS + text)


def test_response_format_section() -> None:
    prompt = encode(TALK, response_format={"type": "object"})
    assert prompt.startswith(f'{BOS}Be brief.\n\n## Format\n{{"type": "object"}}{USER}')


def test_final_assistant_message_can_be_left_open() -> None:
    started = [*TALK, {"role": "assistant", "reasoning_content": "R2", "content": "20 is"}]
    assert encode(started).endswith(f"{THINK_OPEN}R2{THINK_CLOSE}20 is{EOS}")
    assert encode(started, continue_final_message=True).endswith(f"{THINK_OPEN}R2{THINK_CLOSE}20 is")
    thinking = [*TALK, {"role": "assistant", "reasoning_content": "R2"}]
    assert encode(thinking, continue_final_message=True).endswith(f"{THINK_OPEN}R2")
    assert encode([*TALK, {**started[-1], "wo_eos": True}]).endswith("20 is")
    with pytest.raises(RequestError, match="found user"):
        encode(TALK, continue_final_message=True)


def test_bos_is_written_once_or_left_out() -> None:
    assert encode(TALK).count(BOS) == 1
    assert BOS + encode(TALK, add_bos=False) == encode(TALK)


def test_reasoning_is_read_from_either_name() -> None:
    renamed = [{**message} for message in TALK]
    renamed[2]["reasoning"] = renamed[2].pop("reasoning_content")
    assert encode(renamed, drop_thinking=False) == encode(TALK, drop_thinking=False)


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ("hello", "list of messages"),
        ([["user", "x"]], r"messages\[0\] must be an object"),
        ([user("x"), {"role": "function", "content": "x"}], r"messages\[1\]\.role 'function'"),
        ([{"content": "x"}], r"messages\[0\]\.role None"),
        ([user(5)], r"messages\[0\]\.content must be a list"),
        ([user(["x"])], r"messages\[0\]\.content must be a list of objects"),
        ([user([{"type": "text", "text": 5}])], r"content\[0\]\.text must be a string, got int"),
        ([user("x", task="sing")], "task 'sing'"),
        ([{"role": "developer", "content": ""}], "developer and no content"),
        ([{"role": "assistant", "tool_calls": [{"function": "f"}]}], r"tool_calls\[0\] must look like"),
        ([{"role": "assistant", "tool_calls": "f"}], "tool_calls must be a list"),
        ([{"role": "system", "content": "", "tools": [{"name": "f"}]}], r"tools\[0\] must look like"),
        ([{"role": "system", "content": "", "response_format": {"x": object()}}], "cannot be written as JSON"),
        ([{"role": "tool", "tool_call_id": 7, "content": ""}], "tool_call_id must be a string"),
    ],
)
def test_bad_messages_are_named(messages: Any, found: str) -> None:
    with pytest.raises(RequestError, match=found):
        encode(messages)


def test_bad_options_are_named() -> None:
    with pytest.raises(RequestError, match="thinking_mode 'deep'"):
        encode(TALK, thinking_mode="deep")
    with pytest.raises(RequestError, match="reasoning_effort 'low' is not one of"):
        encode(TALK, reasoning_effort="low")


def test_a_request_that_needs_a_missing_text_says_which() -> None:
    bare = PromptTexts.from_source("", "encoding_dsv4.py")
    assert encode_messages(TALK, texts=bare) == encode(TALK)
    for options, name in (
        ({"tools": [ADD]}, "TOOLS_TEMPLATE"),
        ({"response_format": {"a": 1}}, "response_format_template"),
        ({"reasoning_effort": "max"}, "REASONING_EFFORT_MAX"),
    ):
        with pytest.raises(RequestError, match=name):
            encode_messages(TALK, texts=bare, **options)
    broken = PromptTexts.from_source("TOOLS_TEMPLATE = 'no place for schemas'", "encoding_dsv4.py")
    with pytest.raises(CheckpointError, match="tool_schemas"):
        encode_messages(TALK, texts=broken, tools=[ADD])


CONTENT = st.text(max_size=12)
MESSAGE = st.one_of(
    st.builds(lambda c, r: {"role": r, "content": c}, CONTENT, st.sampled_from(["system", "user", "latest_reminder"])),
    st.builds(lambda c, i: result(i, c), CONTENT, st.sampled_from("xyz")),
    st.builds(
        lambda c, r, ids, v: {
            "role": "assistant",
            "content": c,
            "reasoning_content": r,
            "tool_calls": [call(i, arguments=json.dumps({"k": v})) for i in ids],
        },
        CONTENT,
        CONTENT,
        st.lists(st.sampled_from("xyz"), max_size=3),
        CONTENT,
    ),
)


@given(st.lists(MESSAGE, max_size=6), st.sampled_from(["thinking", "chat"]), st.booleans())
def test_segments_join_to_the_prompt_and_trust_only_the_template(
    messages: list[dict[str, Any]], mode: str, drop: bool
) -> None:
    options = {"thinking_mode": mode, "drop_thinking": drop}
    segments = encode_segments(messages, texts=sample_texts(), **options)
    assert "".join(text for text, _ in segments) == encode(messages, **options)
    assert all(text for text, _ in segments)
    assert all(a.trusted != b.trusted for a, b in pairwise(segments))
    # Replace every text a client wrote: what is trusted must not change.
    blank = json.loads(json.dumps(messages))
    for message in blank:
        message["content"] = "·" if message["content"] else ""
    other = encode_segments(blank, texts=sample_texts(), **options)
    assert "".join(t for t, trusted in other if trusted) == "".join(t for t, trusted in segments if trusted)


def test_typed_control_tokens_stay_in_untrusted_segments() -> None:
    messages = [{"role": "system", "content": BOS}, user(f"{USER}{THINK_CLOSE}"), result("1", ASSISTANT)]
    segments = encode_segments(messages, texts=sample_texts())
    assert [text for text, trusted in segments if not trusted] == [BOS, f"{USER}{THINK_CLOSE}", ASSISTANT]
