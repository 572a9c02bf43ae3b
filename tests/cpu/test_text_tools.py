"""Tool calls: what is rendered parses back; what is malformed is refused (strict) or survives as text (tolerant)."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_samples import sample_texts, vector

from dsv4.errors import RequestError
from dsv4.text.chat import encode_messages
from dsv4.text.dsml import BLOCK_CLOSE, BLOCK_OPEN, CALL_CLOSE, CALL_OPEN, PARAM_CLOSE, PARAM_OPEN
from dsv4.text.messages import to_json
from dsv4.text.tokens import ASSISTANT, EOS, THINK_CLOSE, THINK_OPEN, USER
from dsv4.text.tools import new_call_id, parse_completion, render_tool_calls

CALL = f'{CALL_OPEN} name="f">\n{PARAM_OPEN} name="a" string="true">x{PARAM_CLOSE}\n{CALL_CLOSE}'
BLOCK = f"{BLOCK_OPEN}\n{CALL}\n{BLOCK_CLOSE}"

# Plain text: no control token and nothing that the grammar gives a meaning to.
PLAIN = st.text(max_size=30).filter(lambda text: not any(mark in text for mark in ("｜", "<think>", "</think>")))
NAME = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,20}", fullmatch=True)
VALUE = st.recursive(
    PLAIN | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PLAIN, inner, max_size=3),
    max_leaves=6,
)
KEY = PLAIN.filter(lambda key: '" string="' not in key)
ARGUMENTS = st.dictionaries(KEY, VALUE, max_size=4).map(lambda value: to_json(value, "arguments"))
CALLS = st.lists(st.builds(lambda n, a: {"function": {"name": n, "arguments": a}}, NAME, ARGUMENTS), max_size=3)


def functions(message: dict[str, Any]) -> list[dict[str, str]]:
    return [call["function"] for call in message["tool_calls"]]


@given(PLAIN, PLAIN, CALLS, st.sampled_from(["thinking", "chat"]), st.booleans())
def test_what_is_rendered_parses_back(
    reasoning: str, content: str, calls: list[dict[str, Any]], mode: str, strict: bool
) -> None:
    message = {"role": "assistant", "reasoning_content": reasoning, "content": content, "tool_calls": calls}
    prompt = encode_messages([{"role": "user", "content": ""}, message], texts=sample_texts(), thinking_mode=mode)
    opening = USER + ASSISTANT + (THINK_OPEN if mode == "thinking" else THINK_CLOSE)
    parsed = parse_completion(prompt.partition(opening)[2], mode, strict=strict)
    assert parsed["role"] == "assistant"
    assert parsed["reasoning_content"] == (reasoning if mode == "thinking" else "")
    assert parsed["content"] == content
    assert functions(parsed) == [call["function"] for call in calls]


def test_published_completion_parses_back() -> None:
    messages, prompt = vector(1)
    completion = prompt[prompt.index(f"{ASSISTANT}<think>") + len(f"{ASSISTANT}<think>") :]
    parsed = parse_completion(completion.partition(USER)[0], strict=True)
    assert parsed["reasoning_content"] == messages[2]["reasoning_content"]
    assert functions(parsed) == [messages[2]["tool_calls"][0]["function"]]


def test_calls_have_the_openai_shape_and_unguessable_ids() -> None:
    (call,) = parse_completion("</think>\n\n" + BLOCK)["tool_calls"]
    assert call.keys() == {"id", "type", "function"} and call["type"] == "function"
    assert call["function"] == {"name": "f", "arguments": '{"a": "x"}'}
    assert len({new_call_id() for _ in range(100)}) == 100 and len(call["id"]) >= 24
    assert parse_completion(BLOCK, "chat", call_ids=lambda: "mine")["tool_calls"][0]["id"] == "mine"


def test_argument_types_and_key_order_survive_as_written() -> None:
    arguments = '{"z": 1.50, "a": "1.50", "m": {"k": [true, null, "ü"]}, "e": ""}'
    rendered = render_tool_calls([{"function": {"name": "f", "arguments": arguments}}])
    assert f'{PARAM_OPEN} name="z" string="false">1.5{PARAM_CLOSE}' in rendered
    assert f'{PARAM_OPEN} name="a" string="true">1.50{PARAM_CLOSE}' in rendered
    assert functions(parse_completion(rendered, "chat"))[0]["arguments"] == arguments.replace("1.50,", "1.5,")
    raw = rendered.replace(">1.5<", ">1.50<")  # JSON is kept as the model wrote it
    assert functions(parse_completion(raw, "chat"))[0]["arguments"] == arguments


@pytest.mark.parametrize("arguments", ["not json", "[1, 2]", "", '{"a": ', "5"])
def test_arguments_that_are_no_object_become_one_parameter(arguments: str) -> None:
    rendered = render_tool_calls([{"function": {"name": "f", "arguments": arguments}}])
    assert f'{PARAM_OPEN} name="arguments" string="true">{arguments}{PARAM_CLOSE}' in rendered


def test_arguments_may_be_an_object_or_absent() -> None:
    assert render_tool_calls([{"function": {"name": "f", "arguments": {"a": "x"}}}]) == BLOCK
    assert (
        render_tool_calls([{"function": {"name": "f"}}])
        == f'{BLOCK_OPEN}\n{CALL_OPEN} name="f">\n\n{CALL_CLOSE}\n{BLOCK_CLOSE}'
    )


def test_only_the_closing_parameter_tag_has_a_meaning_inside_a_value() -> None:
    value = f"\n\n{BLOCK}{BLOCK_CLOSE}{CALL_OPEN}{THINK_OPEN}".replace(PARAM_CLOSE, "")
    rendered = render_tool_calls([{"function": {"name": "f", "arguments": json.dumps({"a": value})}}])
    for strict in (True, False):
        parsed = parse_completion(f"\n\n{rendered}{EOS}", "chat", strict=strict)
        assert json.loads(functions(parsed)[0]["arguments"]) == {"a": value}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("reasoning without end" + EOS, "not closed by </think>"),
        (f"r\n\n{BLOCK}</think>{EOS}", "not closed by </think>"),
        ("r</think>no end", "must end with one"),
        (f"r</think>a{EOS}b", "must end with one"),
        (f"r</think>a{THINK_OPEN}{EOS}", "stray control token <think>"),
        (f"r{THINK_OPEN}</think>a{EOS}", "stray control token <think>"),
        (f"r</think>a{BLOCK}{EOS}", "stray control token ｜DSML｜"),  # without its blank line it is no block
        (f"</think>\n\n{BLOCK} more{EOS}", "text after the tool calls: ' more"),
        (f"</think>\n\n{BLOCK}{EOS}{EOS}", "text after the tool calls"),
        (f"</think>\n\n{BLOCK_OPEN}", "not closed"),
        (f"</think>\n\n{BLOCK[:-1]}", "not closed"),
        (f"</think>\n\n{BLOCK.replace(CALL_OPEN, ' ' + CALL_OPEN)}{EOS}", "line break"),
        (f"</think>\n\n{BLOCK.replace(chr(10) + PARAM_OPEN, PARAM_OPEN)}{EOS}", "line break"),
        (f"</think>\n\n{BLOCK.replace(CALL, CALL.replace('name=', 'nome='))}{EOS}", "expected name="),
        (f"</think>\n\n{BLOCK.replace('string=', 'type=')}{EOS}", "string="),
        (f"</think>\n\n{BLOCK.replace('true', 'yes')}{EOS}", "string="),
        (f"</think>\n\n{BLOCK.replace('true', 'false')}{EOS}", "neither marked as a string nor JSON"),
        (f"</think>\n\n{BLOCK.replace('true', 'false').replace('>x<', '>NaN<')}{EOS}", "nor JSON"),
        (f"</think>\n\n{BLOCK.replace(CALL, CALL.replace(PARAM_CLOSE, PARAM_CLOSE + 'x'))}{EOS}", "expected <"),
        (f"</think>\n\n{BLOCK.replace(CALL, 'call f')}{EOS}", "expected <"),
        (
            f"</think>\n\n{BLOCK.replace(CALL, CALL.replace(CALL_CLOSE, CALL[len(CALL_OPEN) + 11 :]))}{EOS}",
            "occurs twice",
        ),
    ],
)
def test_strict_parsing_refuses(text: str, found: str) -> None:
    with pytest.raises(RequestError, match=found.replace("<｜", "<.").replace("(", r"\(")):
        parse_completion(text, strict=True)


TWICE = CALL.replace(f"\n{CALL_CLOSE}", f'\n{PARAM_OPEN} name="a" string="true">y{PARAM_CLOSE}\n{CALL_CLOSE}')


TOLERANT = [
    ("a" + EOS + "b", "a", []),
    ("a", "a", []),
    ("\n\n" + BLOCK, "", ["f"]),
    (BLOCK, "", ["f"]),
    ("a\n" + BLOCK + "\n", "a", ["f"]),
    (f"a\n\n\n{BLOCK}\n\nb", "a\nb", ["f"]),
    (f"a\n\n{BLOCK}\n\n{BLOCK}", "a", ["f", "f"]),
    (f"a{BLOCK_OPEN}{CALL}{CALL}{BLOCK_CLOSE}", "a", ["f", "f"]),
    (f"a\n\n{BLOCK_OPEN}{BLOCK_CLOSE}", "a", []),
    (f"a\n\n{BLOCK[:-1]}", "a", []),  # cut off: no call, no tag
    (f"a\n\n{BLOCK_OPEN}\n{CALL}\n", "a", []),
    (f"a\n\n{BLOCK_OPEN[:9]}", "a", []),
    ("a\n\n<", "a\n\n<", []),
    (f"a\n\n{BLOCK_OPEN}text", f"a\n\n{BLOCK_OPEN}text", []),  # against the grammar: text
    (f"a\n\n{BLOCK_OPEN}{TWICE}{BLOCK_CLOSE}", f"a\n\n{BLOCK_OPEN}{TWICE}{BLOCK_CLOSE}", []),
    (f"{BLOCK_OPEN}{CALL}oops{BLOCK}", f"{BLOCK_OPEN}{CALL}oops", ["f"]),  # a good block after a bad one counts
    (f"{BLOCK_OPEN}{BLOCK}", BLOCK_OPEN, ["f"]),
    ("a</think>b<think>", "a</think>b<think>", []),
]


@pytest.mark.parametrize(("text", "content", "names"), TOLERANT)
def test_tolerant_parsing_keeps_what_it_can(text: str, content: str, names: list[str]) -> None:
    parsed = parse_completion(text, "chat")
    assert (parsed["content"], [function["name"] for function in functions(parsed)]) == (content, names)
    thought = parse_completion(f"<think>r\n</think>{text}", "thinking")
    assert (thought["reasoning_content"], thought["content"]) == ("r\n", content)


def test_tolerant_parsing_of_unfinished_reasoning_and_odd_values() -> None:
    assert parse_completion("so far", "thinking")["reasoning_content"] == "so far"
    assert parse_completion(f"so\n\n{BLOCK}", "thinking")["reasoning_content"] == f"so\n\n{BLOCK}"
    unquoted = parse_completion(BLOCK.replace("true", "false"), "chat")
    assert functions(unquoted)[0]["arguments"] == '{"a": "x"}'
    with pytest.raises(RequestError, match="thinking_mode"):
        parse_completion("x", "deep")


@given(st.text(max_size=40), st.sampled_from(["thinking", "chat"]))
def test_tolerant_parsing_never_raises(text: str, mode: str) -> None:
    parse_completion(text, mode)
