"""`dsv4 generate`: complete a prompt, streamed, and say how fast."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from dsv4.cli.console import note, put, put_json
from dsv4.cli.groups import command
from dsv4.cli.options import LoadOptions, ModelArgument, SamplingOptions, read_prompt
from dsv4.engine.chat import with_messages
from dsv4.engine.llm import LLM
from dsv4.engine.metrics import RunMetrics
from dsv4.engine.output import PositionLogprobs, RequestOutput
from dsv4.engine.params import SamplingParams
from dsv4.engine.stream import TextStream

Messages = list[dict[str, Any]]


@command
def generate(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The text; - reads stdin.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 128,
    max_model_len: Annotated[
        int | None, typer.Option("--max-model-len", "-c", help="Context in tokens.", show_default="the model's")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="Ask the prompt as a user in the chat format, or complete it as it is.")
    ] = False,
    thinking: Annotated[bool, typer.Option("--think/--no-think", help="With --chat: reason before answering.")] = True,
    system: Annotated[str | None, typer.Option(help="With --chat: the system message.")] = None,
    logprobs: Annotated[int | None, typer.Option(help="With --json: log-probabilities, and so many others.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document at the end.")] = False,
    *,
    sampling: SamplingOptions,
    load: LoadOptions,
) -> None:
    """Complete a prompt. The text goes to stdout as it is written, the speed to stderr."""
    text = read_prompt(prompt, load.ranks())
    name = model.resolve()
    with load.open(name, max_model_len) as llm:
        params = sampling.params(llm, load.seed, max_tokens=max_tokens, logprobs=logprobs)
        with _stream(llm, text, params, chat, thinking, system) as stream:
            parts = []
            for piece in stream:
                parts.append(piece)
                if not as_json:
                    put(piece)
        output = with_messages(stream.output, thinking) if chat else stream.output
        if as_json:
            about = {"model": name, "settings": asdict(load), "sampling": asdict(params)}
            put_json(_document(output, stream.metrics, llm, **about))
        elif not parts or not parts[-1].endswith("\n"):
            put("\n")
        note(speed(output, stream.metrics, llm))


def _stream(llm: LLM, text: str, params: SamplingParams, chat: bool, thinking: bool, system: str | None) -> TextStream:
    if not chat:
        return llm.stream(text, params)
    messages: Messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": text.removesuffix("\n")})  # a pipe's last newline was not meant
    return llm.stream_chat(messages, params, thinking=thinking).text


def speed(output: RequestOutput, metrics: RunMetrics, llm: LLM) -> str:
    """One line: speed of both phases, weight bytes per token and what reading them came to, why the answer ended."""
    answer = output.outputs[0]
    read, rate = llm.weight_bytes_per_token, metrics.decode_tokens_per_second
    reason = f"{answer.finish_reason}" + (f" at {answer.stop_reason!r}" if answer.stop_reason is not None else "")
    return (
        f"prompt {metrics.prompt_tokens} tokens, {metrics.prompt_tokens_per_second:.1f} tok/s | "
        f"decode {metrics.generated_tokens} tokens, {rate:.1f} tok/s | "
        f"weights {read / 1e6:.2f} MB/token as stored, {read * rate / 1e9:.2f} GB/s | ended by {reason}"
    )


def _document(output: RequestOutput, metrics: RunMetrics, llm: LLM, **about: Any) -> dict[str, Any]:
    answer = output.outputs[0]
    read, rate = llm.weight_bytes_per_token, metrics.decode_tokens_per_second
    return {
        **about,
        "prompt": output.prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "message": answer.message,
        "cumulative_logprob": answer.cumulative_logprob,
        "logprobs": answer.logprobs and [_candidates(position) for position in answer.logprobs],
        "metrics": {
            **asdict(metrics),
            "prompt_tokens_per_second": metrics.prompt_tokens_per_second,
            "decode_tokens_per_second": rate,
            "weight_bytes_per_token": read,
            "weight_gb_per_second": read * rate / 1e9,
        },
    }


def _candidates(position: PositionLogprobs) -> list[dict[str, Any]]:
    """The sampled token first, then the most likely ones."""
    return [
        {"token_id": token, "token": entry.decoded_token, "logprob": entry.logprob, "rank": entry.rank}
        for token, entry in position.items()
    ]
