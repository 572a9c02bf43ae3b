"""`dsv4 chat`: a conversation in the terminal."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from dsv4.cli.console import error, note, put, stderr
from dsv4.cli.generate import speed
from dsv4.cli.groups import command
from dsv4.cli.options import LoadOptions, ModelArgument, SamplingOptions
from dsv4.engine.llm import LLM
from dsv4.engine.params import SamplingParams
from dsv4.engine.stream import ChatStream
from dsv4.errors import Dsv4Error, RequestError
from dsv4.text import parse_completion

HELP = """/think [EFFORT]  reason before answering   /nothink  answer at once
/reset           forget the conversation   /help     this text
/quit            leave (so does Ctrl-D)    Ctrl-C    stop the answer, or leave"""


@command
def chat(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    thinking: Annotated[bool, typer.Option("--think/--no-think", help="Reason before answering.")] = True,
    reasoning_effort: Annotated[str | None, typer.Option(help="A level this release knows, such as max.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Stop an answer after so many tokens.", show_default="what the context allows")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option("--max-model-len", "-c", help="Context in tokens.", show_default="the model's")
    ] = None,
    *,
    sampling: SamplingOptions,
    load: LoadOptions,
) -> None:
    """Talk to a model. Reasoning is shown dim; answers go to stdout, everything else to stderr."""
    if load.tp > 1:
        raise RequestError(f"dsv4 chat runs in one process, got --tp {load.tp}; dsv4 generate --chat takes it")
    with load.open(model.resolve(), max_model_len) as llm:
        params = sampling.params(llm, None, max_tokens=max_tokens)
        session = Session(llm, params, system=system, thinking=thinking, effort=reasoning_effort)
        if sys.stdin.isatty():
            note("/help lists the commands, /quit leaves")
        while session.open and (line := _read_line()) is not None:
            session.take(line.strip())


def _read_line() -> str | None:
    """A line of stdin, with a prompt on a terminal; None at its end."""
    try:
        if sys.stdin.isatty():
            if not sys.stdout.isatty():  # input() would write its prompt among the answers
                stderr().print("> ", end="")
            return input("> " if sys.stdout.isatty() else "")
        return sys.stdin.readline() or None
    except EOFError:
        return None
    except UnicodeDecodeError as broken:
        raise RequestError(f"stdin is not UTF-8 text ({broken})") from broken


class Session:
    """A conversation: what was said, and the switches that commands change."""

    def __init__(self, llm: LLM, params: SamplingParams, *, system: str | None, thinking: bool, effort: str | None):
        self.llm, self.params, self.thinking, self.effort = llm, params, thinking, effort
        self.open = True
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, Any]] = list(self._system)

    def take(self, line: str) -> None:
        """A command, or something to answer."""
        if line.startswith("/"):
            self._command(*line[1:].split())
        elif line:
            self._answer(line)

    def _command(self, name: str = "", *arguments: str) -> None:
        if name == "think":
            self.thinking, self.effort = True, arguments[0] if arguments else self.effort
            note("thinking on" + (f", effort {self.effort}" if self.effort else ""))
        elif name == "nothink":
            self.thinking = False
            note("thinking off")
        elif name == "reset":
            self.messages = list(self._system)
            note("conversation forgotten")
        elif name in ("quit", "exit"):
            self.open = False
        else:
            if name != "help":
                error(f"no command /{name}")
            stderr().print(HELP, markup=False)

    def _answer(self, question: str) -> None:
        """Stream an answer. A failure or Ctrl-C ends the answer, not the session; a failed question is forgotten."""
        self.messages.append({"role": "user", "content": question})
        try:
            effort = self.effort if self.thinking else None
            stream = self.llm.stream_chat(self.messages, self.params, thinking=self.thinking, reasoning_effort=effort)
            with stream:
                try:
                    self._show(stream)
                except KeyboardInterrupt:
                    stream.close()
                    note("\nstopped")
        except Dsv4Error as failure:
            error(str(failure))
            self.messages.pop()
            return
        note(speed(stream.output, stream.metrics, self.llm))
        text = stream.output.outputs[0].text
        self.messages.append(parse_completion(text, "thinking" if self.thinking else "chat"))

    def _show(self, stream: ChatStream) -> None:
        """Reasoning dim on stderr, content on stdout, both as they come; tool calls as lines of JSON."""
        shown = ""
        for delta in stream:
            if shown == "reasoning" and delta.kind != "reasoning":
                stderr().print()
            shown = delta.kind
            if delta.kind == "reasoning":
                stderr().print(delta.text, style="dim", end="", markup=False)
            else:
                put(delta.text if delta.call is None else json.dumps(delta.call["function"], ensure_ascii=False) + "\n")
        if shown == "content":
            put("\n")
        elif shown == "reasoning":
            stderr().print()
