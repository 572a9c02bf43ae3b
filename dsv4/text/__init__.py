"""Text in and out: tokenizer, prompts, tool calls, streams. Imports nothing of dsv4 but its errors."""

from dsv4.text.chat import encode_messages, encode_segments
from dsv4.text.texts import PromptTexts
from dsv4.text.tools import parse_completion

__all__ = ["PromptTexts", "encode_messages", "encode_segments", "parse_completion"]
