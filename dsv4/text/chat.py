"""Messages to prompt, exactly as the official V4 encoder writes it.

A prompt is BOS, then every turn with nothing between them. The `<think>` or `</think>` that opens an assistant turn is
written by the user turn before it. Official behaviour is kept to the byte; the tests hold the published vectors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dsv4.errors import RequestError
from dsv4.text.messages import Message, Turn, drop_earlier_reasoning, is_thinking, last_user_index, to_json, to_turns
from dsv4.text.segments import Segment, SegmentList
from dsv4.text.template import fill
from dsv4.text.texts import PromptTexts
from dsv4.text.tokens import ASSISTANT, BOS, DSML, EOS, LATEST_REMINDER, TASKS, THINK_CLOSE, THINK_OPEN, USER
from dsv4.text.tools import tool_calls_segments


def encode_messages(messages: Sequence[Message], *, texts: PromptTexts, **options: Any) -> str:
    """The prompt as one string, byte for byte what the official encoder gives; arguments as for encode_segments."""
    return "".join(text for text, _ in encode_segments(messages, texts=texts, **options))


def encode_segments(
    messages: Sequence[Message],
    *,
    texts: PromptTexts,
    thinking_mode: str = "thinking",
    drop_thinking: bool = True,
    reasoning_effort: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    response_format: Any = None,
    add_bos: bool = True,
    continue_final_message: bool = False,
) -> list[Segment]:
    """The prompt in pieces: template text is trusted, whatever came in through `messages` and `tools` is not.

    messages        OpenAI-shaped dicts; roles system, user, assistant, tool, latest_reminder, developer. Read: content
                    (string or list of parts), reasoning_content (or reasoning), tool_calls, tool_call_id, tools,
                    response_format, task, wo_eos, content_blocks
    texts           the release's literal texts
    thinking_mode   "thinking" or "chat"
    drop_thinking   leave out the reasoning of turns before the last user turn (never done if any message has tools)
    reasoning_effort  a level of this release (PromptTexts.effort_level maps API names); no effect in chat mode
    tools, response_format   request-level values, put on a leading system message (an empty one is added if needed);
                    a message's own `tools` are rendered for the roles system and developer
    add_bos         start with BOS
    continue_final_message   leave the last assistant turn open: no EOS, and if it has no content and no tool calls the
                    reasoning stays open as well
    Raises RequestError for anything that cannot be encoded as asked, CheckpointError for a broken template.
    """
    thinking = is_thinking(thinking_mode)
    turns = to_turns(messages)
    if tools or response_format is not None:
        turns = _with_request_fields(turns, tools or (), response_format)
    if continue_final_message and (not turns or turns[-1].role != "assistant"):
        found = turns[-1].role if turns else "nothing"
        raise RequestError(f"continue_final_message needs an assistant message at the end, found {found}")
    drop = thinking and drop_thinking and not any(turn.tools for turn in turns)
    if drop:
        turns = drop_earlier_reasoning(turns)

    out = SegmentList()
    if add_bos:
        out.trusted(BOS)
    preamble = texts.effort_preamble(reasoning_effort) if thinking else ""
    if turns:
        out.trusted(preamble)
    last_user = last_user_index(turns)
    for index, turn in enumerate(turns):
        following = turns[index + 1].role if index + 1 < len(turns) else None
        if turn.role == "assistant":
            answers_task = index > 0 and turns[index - 1].task is not None
            reasons = thinking and not answers_task and (not drop or index > last_user)
            _assistant(out, turn, reasons, leave_open=continue_final_message and following is None)
        else:
            _other(out, turn, texts)
        if following in (None, "assistant", "latest_reminder"):
            _hand_over(out, turn, thinking, opens_thinking=thinking and (not drop or index >= last_user))
    return list(out)


def _with_request_fields(turns: list[Turn], tools: Sequence[Mapping[str, Any]], response_format: Any) -> list[Turn]:
    """Put request-level tools and response format on the leading system turn."""
    head, rest = (turns[0], turns[1:]) if turns and turns[0].role == "system" else (Turn("system"), turns)
    if head.tools and tools:
        raise RequestError("tools are given both for the request and in the system message; give them once")
    if head.response_format is not None and response_format is not None:
        raise RequestError("response_format is given both for the request and in the system message; give it once")
    chosen = head.response_format if response_format is None else response_format
    return [replace(head, tools=head.tools or tuple(tools), response_format=chosen), *rest]


def _other(out: SegmentList, turn: Turn, texts: PromptTexts) -> None:
    """A system, developer, latest_reminder or user turn, up to where the assistant would start."""
    if turn.role == "latest_reminder":
        out.trusted(LATEST_REMINDER)
        out.untrusted(turn.text)
        return
    if turn.role == "user":
        out.trusted(USER)
        for position, block in enumerate(turn.blocks):
            out.trusted("\n\n" if position else "")
            out.trusted("<tool_result>" if block.is_result else "")
            out.untrusted(block.text)
            out.trusted("</tool_result>" if block.is_result else "")
        return
    if turn.role == "developer":
        out.trusted(USER)
    out.untrusted(turn.text)
    if turn.tools:
        out.trusted("\n\n")
        out.extend(render_tools(turn.tools, texts))
    if turn.response_format:
        out.trusted("\n\n")
        schema = to_json(turn.response_format, "response_format")
        out.extend(fill(texts.require_response_format(), "response_format_template", {}, {"schema": schema}))


def render_tools(tools: Sequence[Mapping[str, Any]], texts: PromptTexts) -> SegmentList:
    """The tools section: the release's template with one JSON schema (the `function` object) per line."""
    schemas = []
    for index, tool in enumerate(tools):
        function = tool.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f'tools[{index}] must look like {{"type": "function", "function": {{"name": …}}}}')
        schemas.append(to_json(function, f"tools[{index}].function"))
    tokens = {"dsml_token": DSML, "thinking_start_token": THINK_OPEN, "thinking_end_token": THINK_CLOSE}
    return fill(texts.require_tools(), "TOOLS_TEMPLATE", tokens, {"tool_schemas": "\n".join(schemas)})


def _assistant(out: SegmentList, turn: Turn, reasons: bool, leave_open: bool) -> None:
    if reasons:
        out.untrusted(turn.reasoning)
        if leave_open and not turn.has_content and not turn.tool_calls:
            return
        out.trusted(THINK_CLOSE)
    out.untrusted(turn.text)
    if turn.tool_calls:
        out.trusted("\n\n")
        out.extend(tool_calls_segments(turn.tool_calls))
    if not (leave_open or turn.wo_eos):
        out.trusted(EOS)


def _hand_over(out: SegmentList, turn: Turn, thinking: bool, opens_thinking: bool) -> None:
    """What follows a turn that is last or stands before an assistant turn: a task token, or the assistant's opening."""
    if turn.task == "action":
        out.trusted(ASSISTANT + (THINK_OPEN if thinking else THINK_CLOSE) + TASKS["action"])
    elif turn.task is not None:
        out.trusted(TASKS[turn.task])
    elif turn.role in ("user", "developer"):
        out.trusted(ASSISTANT + (THINK_OPEN if opens_thinking else THINK_CLOSE))
