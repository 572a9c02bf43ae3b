"""`dsv4 compare`: one prompt under two settings or two checkpoints, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dsv4.cli.console import put_json
from dsv4.cli.groups import command
from dsv4.cli.options import ModelArgument, read_prompt
from dsv4.cli.settings import Setting, load_setting, parse_setting
from dsv4.engine.llm import LLM
from dsv4.engine.output import RequestOutput
from dsv4.engine.params import SamplingParams
from dsv4.errors import RequestError
from dsv4.model import Model

DEFAULT_PROMPT = 'def read(self, path):\n    """Return the text of a file."""\n    with open(path) as file:\n'


@dataclass(frozen=True)
class Comparison:
    """b beside a. `layers`: relative error ||b - a|| / ||a|| of the residual streams after every site, over the prompt.

    `max_logit_delta`, `top1_agreement`, `mean_kl` (nats, of b from a) are over the prompt's rows too.
    `first_difference` is the index of the first greedy token that differs, None if none does.
    """

    prompt_tokens: int
    layers: dict[str, float]
    max_logit_delta: float
    top1_agreement: float
    mean_kl: float
    tokens_a: list[int]
    tokens_b: list[int]
    first_difference: int | None


@command
def compare(
    model: ModelArgument,
    a: Annotated[str, typer.Option("--a", help="Setting A: a name such as bf16, or key=value,...")] = "",
    b: Annotated[str, typer.Option("--b", help="Setting B; both may be given in full or in part.")] = "",
    model_b: Annotated[str | None, typer.Option("--model-b", help="B's checkpoint.", show_default="MODEL")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The text; - reads stdin.")] = None,
    prompt_ids: Annotated[str | None, typer.Option(help="Token ids instead, joined by commas.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Greedy tokens to compare.")] = 32,
    device: Annotated[str, typer.Option(help="Where to run.", envvar="DSV4_DEVICE")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Run a prompt twice and say where and how far the two drift apart.

    A setting joins key=value pairs by commas: act=bf16|fp8|nvfp4, dtype=bfloat16|float32, kv_quant=on|off,
    index_quant=on|off, weights=native|bf16|official|nvfp4-experts|nvfp4; or it is a name of dsv4 eval --table.
    """
    first, second = parse_setting(a), parse_setting(b)
    name = model.resolve()
    models = load_setting(name, first, device=device), load_setting(model_b or name, second, device=device)
    result = compare_models(*models, _prompt(models[0], prompt, prompt_ids), max_tokens)
    sides = {"a": (name, first), "b": (model_b or name, second)}
    if as_json:
        described = {side: {"model": path, "setting": asdict(s)} for side, (path, s) in sides.items()}
        put_json({**described, **asdict(result)})
    else:
        _render(result, sides, LLM(models[0], max_num_seqs=1, max_model_len=1))


def _prompt(model: Model, text: str | None, ids: str | None) -> str | list[int]:
    if ids is not None:
        try:
            return [int(part) for part in ids.split(",")]
        except ValueError:
            raise RequestError(f"--prompt-ids must be integers joined by commas, got {ids!r}") from None
    if text is None and model.path is None:  # a model made from a seed has no tokenizer
        return [(7 * i + 3) % model.config.vocab_size for i in range(64)]
    return DEFAULT_PROMPT if text is None else read_prompt(text)


def compare_models(a: Model, b: Model, prompt: str | list[int], max_tokens: int) -> Comparison:
    """RequestError if the two have different layers or vocabularies."""
    shapes = [(m.config.num_hidden_layers, m.config.vocab_size, m.config.hidden_size) for m in (a, b)]
    if shapes[0] != shapes[1]:
        raise RequestError(f"the models differ in (layers, vocabulary, hidden size): {shapes[0]} and {shapes[1]}")
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    outputs: list[RequestOutput] = []
    for model in (a, b):
        with LLM(model, max_num_seqs=1) as llm:
            # token ids of A serve both: the prompt is the same even if B has another tokenizer, or none
            outputs += llm.generate(prompt if not outputs else outputs[0].prompt_token_ids, params)
    ids = outputs[0].prompt_token_ids
    seen_a, seen_b = _observe(a, ids), _observe(b, ids)
    logits_a, logits_b = seen_a.pop("logits"), seen_b.pop("logits")
    log_a, log_b = logits_a.log_softmax(-1), logits_b.log_softmax(-1)
    tokens = [output.outputs[0].token_ids for output in outputs]
    longest = max(map(len, tokens))
    return Comparison(
        prompt_tokens=len(ids),
        layers={name: _relative(seen_b[name], seen_a[name]) for name in seen_a},
        max_logit_delta=(logits_b - logits_a).abs().max().item(),
        top1_agreement=(logits_a.argmax(-1) == logits_b.argmax(-1)).double().mean().item(),
        mean_kl=(log_a.exp() * (log_a - log_b)).sum(-1).mean().item(),
        tokens_a=tokens[0],
        tokens_b=tokens[1],
        first_difference=next((i for i in range(longest) if tokens[0][i : i + 1] != tokens[1][i : i + 1]), None),
    )


def _observe(model: Model, ids: list[int]) -> dict[str, Tensor]:
    """What the model shows while it reads the prompt in one piece, in float64."""
    seen: dict[str, Tensor] = {}
    cache = model.new_cache(1, len(ids))
    batch = [(cache.acquire(), torch.tensor(ids))]
    model.forward(batch, cache, all_logits=True, observe=lambda name, value: seen.update({name: value.double().cpu()}))
    return seen


def _relative(value: Tensor, truth: Tensor) -> float:
    return ((value - truth).norm() / truth.norm().clamp_min(1e-300)).item()


def _render(result: Comparison, sides: dict[str, tuple[str, Setting]], llm: LLM) -> None:
    console = Console(highlight=False)
    for side, (path, setting) in sides.items():
        console.print(f"{side}: {path}  {setting}", markup=False, soft_wrap=True)
    table = Table("stream after", "relative error", box=SIMPLE_HEAD, pad_edge=False)
    for name, value in result.layers.items():
        table.add_row(name, f"{value:.3e}")
    console.print(table)
    console.print(
        f"logits of {result.prompt_tokens} prompt tokens: largest difference {result.max_logit_delta:.4g}, "
        f"same best token in {result.top1_agreement:.1%}, KL {result.mean_kl:.3e} nats",
        soft_wrap=True,
    )
    at, count = result.first_difference, len(result.tokens_a)
    if at is None:
        console.print(f"greedy tokens: all {count} equal")
        return
    shown = [_token(llm, tokens[at : at + 1]) for tokens in (result.tokens_a, result.tokens_b)]
    console.print(f"greedy tokens: the first {at} equal, then {shown[0]} and {shown[1]}", markup=False, soft_wrap=True)


def _token(llm: LLM, ids: list[int]) -> str:
    if not ids:
        return "the end"
    text = "" if llm.tokenizer is None else f" {llm.tokenizer.decode(ids, skip_special=False)!r}"
    return f"{ids[0]}{text}"
