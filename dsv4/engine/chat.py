"""Conversations: messages to a prompt, and an answer back to a message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from dsv4.engine.output import RequestOutput
from dsv4.engine.prompts import Prompt
from dsv4.text import PromptTexts, encode_segments, parse_completion
from dsv4.text.tokenizer import Tokenizer

ThinkingMode = Literal["thinking", "chat"]


def thinking_mode(thinking: bool) -> ThinkingMode:
    return "thinking" if thinking else "chat"


class ChatPrompt:
    """Encodes conversations with the tokenizer and the prompt texts of one checkpoint."""

    def __init__(self, tokenizer: Tokenizer, folder: Path | None):
        self.tokenizer = tokenizer
        self.texts = PromptTexts() if folder is None else PromptTexts.from_folder(folder)

    def encode(self, messages: Sequence[Mapping[str, Any]], thinking: bool, options: Mapping[str, Any]) -> Prompt:
        """Control tokens typed in messages stay ordinary text; `options` are those of encode_segments."""
        segments = encode_segments(messages, texts=self.texts, thinking_mode=thinking_mode(thinking), **options)
        return Prompt("".join(text for text, _ in segments), self.tokenizer.encode_chat(segments))


def with_messages(output: RequestOutput, thinking: bool) -> RequestOutput:
    """The output with every answer parsed into an OpenAI-shaped message."""
    mode = thinking_mode(thinking)
    return replace(output, outputs=[replace(o, message=parse_completion(o.text, mode)) for o in output.outputs])
