"""DSML tool calls: writing them into a prompt, and reading a completion back into an OpenAI-shaped message."""

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsv4.errors import RequestError
from dsv4.text.dsml import BLOCK_CLOSE, BLOCK_OPEN, CALL_CLOSE, CALL_OPEN, PARAM_CLOSE, PARAM_OPEN, BlockScanner
from dsv4.text.messages import is_thinking, to_json
from dsv4.text.segments import SegmentList
from dsv4.text.tokens import BOS, DSML, EOS, THINK_CLOSE, THINK_OPEN


def new_call_id() -> str:
    """An unguessable tool-call id."""
    return "call_" + secrets.token_hex(12)


def openai_call(name: str, arguments: str, call_id: str) -> dict[str, Any]:
    """One entry of `tool_calls` in the OpenAI shape; arguments is the JSON text of an object."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def render_tool_calls(tool_calls: Sequence[Mapping[str, Any]]) -> str:
    """The DSML block of an assistant turn, without the blank line before it."""
    return str(tool_calls_segments(tool_calls))


def tool_calls_segments(tool_calls: Sequence[Mapping[str, Any]]) -> SegmentList:
    """The DSML block in pieces: tags trusted, names and values not.

    tool_calls   [{"function": {"name": str, "arguments": JSON text of an object, or the object}}, ...]
    Arguments that are not a JSON object are sent as one string parameter called "arguments", as the official encoder
    does for text that is not JSON.
    """
    out = SegmentList()
    out.trusted(BLOCK_OPEN + "\n")
    for index, call in enumerate(tool_calls):
        function = call["function"]
        out.trusted(CALL_OPEN + ' name="')
        out.untrusted(function["name"])
        out.trusted('">\n')
        for position, (key, value) in enumerate(_arguments(function.get("arguments")).items()):
            out.trusted("\n" if position else "")
            out.trusted(PARAM_OPEN + ' name="')
            out.untrusted(key)
            out.trusted(f'" string="{"true" if isinstance(value, str) else "false"}">')
            out.untrusted(value if isinstance(value, str) else to_json(value, f"tool_calls[{index}].{key}"))
            out.trusted(PARAM_CLOSE)
        out.trusted("\n" + CALL_CLOSE + "\n")
    out.trusted(BLOCK_CLOSE)
    return out


def _arguments(arguments: Any) -> Mapping[str, Any]:
    if arguments is None or isinstance(arguments, Mapping):
        return arguments or {}
    text = arguments if isinstance(arguments, str) else to_json(arguments, "tool-call arguments")
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        parsed = None
    return parsed if isinstance(parsed, dict) else {"arguments": text}


def parse_completion(
    text: str,
    thinking_mode: str = "thinking",
    *,
    strict: bool = False,
    call_ids: Callable[[], str] = new_call_id,
) -> dict[str, Any]:
    """A completion (what follows `<｜Assistant｜><think>` or `</think>`) as a message.

    ->  {"role": "assistant", "reasoning_content": str, "content": str, "tool_calls": [openai_call, ...]}

    Tolerant by default, never raises: text after EOS is ignored; thinking without `</think>` is all reasoning; a block
    that breaks the grammar stays in the content as text; a block that is cut off is left out. strict=True accepts only
    what the official parser accepts (EOS included) and raises RequestError for everything else.
    """
    parse = _parse_strict if strict else _parse_tolerant
    reasoning, content, calls = parse(text, is_thinking(thinking_mode))
    return {
        "role": "assistant",
        "reasoning_content": reasoning,
        "content": content,
        "tool_calls": [openai_call(name, arguments, call_ids()) for name, arguments in calls],
    }


Parsed = tuple[str, str, list[tuple[str, str]]]


def _parse_strict(text: str, thinking: bool) -> Parsed:
    reasoning, rest = "", text
    if thinking:
        reasoning, closed, rest = text.partition(THINK_CLOSE)
        if not closed or "\n\n" + BLOCK_OPEN[:-1] in reasoning:
            raise RequestError(f"the reasoning is not closed by {THINK_CLOSE} before the answer")
    calls: list[tuple[str, str]] = []
    block = rest.find("\n\n" + BLOCK_OPEN[:-1])
    end = rest.find(EOS)
    if block >= 0 and (end < 0 or block < end):
        content = rest[:block]
        scanner = BlockScanner(strict=True)
        scanner.feed(rest[block + 2 :])
        if scanner.state != "done":
            raise RequestError(f"malformed tool calls: {scanner.problem or 'the block is not closed'}")
        calls, tail = scanner.calls, scanner.rest()
        if tail not in ("", EOS):
            raise RequestError(f"text after the tool calls: {tail[:40]!r}")
    else:
        content = rest[:end]
        if end < 0 or rest[end:] != EOS:
            raise RequestError(f"the completion must end with one {EOS}")
    for token in (BOS, EOS, THINK_OPEN, THINK_CLOSE, DSML):
        if token in content or token in reasoning:
            raise RequestError(f"stray control token {token} in the completion")
    return reasoning, content, calls


def _parse_tolerant(text: str, thinking: bool) -> Parsed:
    text = text.partition(EOS)[0]
    reasoning = ""
    if thinking:
        reasoning, _, text = text.removeprefix(THINK_OPEN).partition(THINK_CLOSE)
    content: list[str] = []
    calls: list[tuple[str, str]] = []
    while (start := text.find(BLOCK_OPEN)) >= 0:
        scanner = BlockScanner()
        scanner.feed(text[start:])
        if scanner.state == "malformed":
            content.append(text[:start] + scanner.taken())
            text = scanner.rest()
        else:
            content.append(without_gap(text[:start]))
            calls += scanner.calls if scanner.state == "done" else []
            text = scanner.rest().lstrip() if scanner.state == "done" else ""
    content.append(without_cut_tag(text))
    return reasoning, "".join(content), calls


def without_gap(text: str) -> str:
    """Text without the blank line at its end, which belongs to the block that follows."""
    return text[: len(text) - min(2, len(text) - len(text.rstrip("\n")))]


def without_cut_tag(text: str) -> str:
    """Text without the beginning of a block tag that it ends with, if that beginning shows what it was to become."""
    shown = text.rfind("<" + DSML)
    return without_gap(text[:shown]) if shown >= 0 and BLOCK_OPEN.startswith(text[shown:]) else text
