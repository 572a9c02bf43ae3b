"""From OpenAI-shaped messages to the turns V4 knows: validation, the merge pass, result order, dropped reasoning."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsv4.errors import RequestError
from dsv4.text.tokens import TASKS

Message = Mapping[str, Any]
THINKING_MODES = ("thinking", "chat")
ROLES = ("system", "user", "assistant", "tool", "latest_reminder", "developer")


@dataclass(frozen=True)
class Block:
    """One part of a user turn: text, or the result of the tool call `call_id`."""

    text: str
    is_result: bool = False
    call_id: str = ""


@dataclass(frozen=True)
class Turn:
    """One rendered unit: a message, or the user and tool messages that were merged into one user turn."""

    role: str
    text: str = ""
    blocks: tuple[Block, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    response_format: Any = None
    task: str | None = None
    wo_eos: bool = False
    has_content: bool = True


def to_turns(messages: Sequence[Message]) -> list[Turn]:
    """Validate and merge. Raises RequestError that names the message's index and what is wrong with it.

    Consecutive user and tool messages become one user turn (a user message after one that carries a task starts anew,
    and as in the official encoder a task on a user message that is merged away is not kept). Results are then put in
    the order of the calls they answer.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError(f"messages must be a list of messages, got {type(messages).__name__}")
    turns: list[Turn] = []
    for index, message in enumerate(messages):
        turn = _turn(f"messages[{index}]", message)
        last = turns[-1] if turns else None
        from_tool = message["role"] == "tool"
        if turn.role == "user" and last and last.role == "user" and (from_tool or last.task is None):
            turns[-1] = replace(last, blocks=last.blocks + turn.blocks, tools=last.tools + turn.tools)
        else:
            turns.append(turn)
    return _order_results(turns)


def last_user_index(turns: Sequence[Turn]) -> int:
    """Index of the last user or developer turn, -1 if there is none."""
    return max((index for index, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1)


def drop_earlier_reasoning(turns: Sequence[Turn]) -> list[Turn]:
    """Before the last user turn: assistant turns lose their reasoning, developer turns go."""
    last = last_user_index(turns)
    kept = [turn for index, turn in enumerate(turns) if index >= last or turn.role != "developer"]
    last = last_user_index(kept)
    return [replace(turn, reasoning="") if index < last else turn for index, turn in enumerate(kept)]


def is_thinking(thinking_mode: str) -> bool:
    """True for "thinking", False for "chat"; RequestError for anything else."""
    if thinking_mode not in THINKING_MODES:
        raise RequestError(f"thinking_mode {thinking_mode!r} is not known, use one of {', '.join(THINKING_MODES)}")
    return thinking_mode == "thinking"


def to_json(value: Any, where: str) -> str:
    """JSON with ", " and ": " separators, non-ASCII kept, as prompts hold it."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{where} cannot be written as JSON: {error}") from error


def _turn(where: str, message: Message) -> Turn:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object with a role, got {type(message).__name__}")
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(f"{where}.role {role!r} is not known, use one of {', '.join(ROLES)}")
    content = message.get("content")
    if role == "tool":
        call_id = _string(f"{where}.tool_call_id", message.get("tool_call_id"))
        return Turn("user", blocks=(Block(_joined(f"{where}.content", content), True, call_id),))
    task = message.get("task")
    if task is not None and task not in TASKS:
        raise RequestError(f"{where}.task {task!r} is not known, use one of {', '.join(TASKS)}")
    turn = Turn(
        role,
        tools=tuple(_list(f"{where}.tools", message.get("tools"))),
        response_format=message.get("response_format"),
        task=task,
    )
    if role == "user":
        return replace(turn, blocks=tuple(_user_blocks(where, message)))
    turn = replace(turn, text=_joined(f"{where}.content", content), has_content=content is not None)
    if role == "developer" and not turn.text:
        raise RequestError(f"{where} has the role developer and no content")
    if role == "assistant":
        key = "reasoning_content" if message.get("reasoning_content") is not None else "reasoning"
        turn = replace(
            turn,
            reasoning=_joined(f"{where}.{key}", message.get(key)),
            tool_calls=_tool_calls(f"{where}.tool_calls", message.get("tool_calls")),
            wo_eos=bool(message.get("wo_eos", False)),
        )
    return turn


def _user_blocks(where: str, message: Message) -> list[Block]:
    """The blocks of a user message: `content_blocks` if it has them, else its content (a string or a list of parts)."""
    key = "content" if message.get("content_blocks") is None else "content_blocks"
    parts = message.get(key)
    if parts is None or isinstance(parts, str):
        return [Block(parts or "")]
    blocks = []
    for index, part in enumerate(_list(f"{where}.{key}", parts)):
        if part.get("type") == "tool_result":
            call_id = _string(f"{where}.{key}[{index}].tool_use_id", part.get("tool_use_id"))
            blocks.append(Block(_joined(f"{where}.{key}[{index}].content", part.get("content")), True, call_id))
        else:
            blocks.append(Block(_part_text(f"{where}.{key}[{index}]", part)))
    return blocks


def _part_text(where: str, part: Mapping[str, Any]) -> str:
    if part.get("type") == "text":
        return _string(f"{where}.text", part.get("text"))
    return f"[Unsupported {part.get('type')}]"


def _joined(where: str, content: Any) -> str:
    """A string as it is; a list of parts joined by a blank line, each part that is not text as "[Unsupported type]"."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n\n".join(_part_text(f"{where}[{index}]", part) for index, part in enumerate(_list(where, content)))


def _tool_calls(where: str, calls: Any) -> tuple[Mapping[str, Any], ...]:
    for index, call in enumerate(_list(where, calls)):
        function = call.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f'{where}[{index}] must look like {{"function": {{"name": …, "arguments": …}}}}')
    return tuple(_list(where, calls))


def _string(where: str, value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise RequestError(f"{where} must be a string, got {type(value).__name__}")
    return value or ""


def _list(where: str, value: Any) -> Sequence[Mapping[str, Any]]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, Mapping) for item in value):
        raise RequestError(f"{where} must be a list of objects, got {type(value).__name__}")
    return value


def _order_results(turns: list[Turn]) -> list[Turn]:
    """Sort the results inside each user turn by the calls of the assistant turn before; unknown ids count as first."""
    order: dict[str, int] = {}
    for index, turn in enumerate(turns):
        if turn.tool_calls:
            ids = [call.get("id") or call["function"].get("id") for call in turn.tool_calls]
            order = {call_id: position for position, call_id in enumerate(ids) if call_id}
        turns[index] = replace(turn, blocks=_in_order(turn.blocks, order))
    return turns


def _in_order(blocks: tuple[Block, ...], order: Mapping[str, int]) -> tuple[Block, ...]:
    """Results sorted among the places that hold results; text stays where it is."""
    results = iter(sorted((b for b in blocks if b.is_result), key=lambda b: order.get(b.call_id, 0)))
    return tuple(next(results) if block.is_result else block for block in blocks)
