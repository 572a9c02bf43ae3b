"""The options several commands share, each group written once."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Annotated, Any, Literal

import torch
import typer

from dsv4.cli.console import note
from dsv4.cli.ranks import start
from dsv4.engine.llm import LLM
from dsv4.engine.params import SamplingParams
from dsv4.errors import RequestError
from dsv4.model import Model, load
from dsv4.parallel.mesh import Experts, Mesh

EMBEDDED = "nano"
# Steps that read less than this are made of operations so short that handing them to a second thread costs more than it
# gives, and many times more when that core is busy with something else.
SMALL_BYTES = 64_000_000
_MODEL_HELP = "Checkpoint folder, nano (the embedded model), or random:tiny|flash|pro."


def _loading(help: str, *names: str, env: str) -> Any:
    return typer.Option(*names, help=help, envvar=env, rich_help_panel="Loading")


def _sampling(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel="Sampling")


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded and run."""

    device: Annotated[str, _loading("Where to run.", env="DSV4_DEVICE")] = "cpu"
    dtype: Annotated[Literal["bfloat16", "float32"], _loading("Of everything between ops.", env="DSV4_DTYPE")] = (
        "bfloat16"
    )
    act: Annotated[
        Literal["bf16", "fp8", "nvfp4"],
        _loading("Inputs of linears: bf16 (W4A16), fp8 (DeepSeek's script), nvfp4 (W4A4).", env="DSV4_ACT"),
    ] = "bf16"
    weights: Annotated[
        Literal["native", "nvfp4"],
        _loading("Linears as stored, or every large one requantised at load.", env="DSV4_WEIGHTS"),
    ] = "native"
    kv_quant: Annotated[
        bool, _loading("The trained-in FP8 of KV entries.", "--kv-quant/--no-kv-quant", env="DSV4_KV_QUANT")
    ] = True
    index_quant: Annotated[
        bool,
        _loading("The trained-in FP4 of index keys.", "--index-quant/--no-index-quant", env="DSV4_INDEX_QUANT"),
    ] = True
    layers: Annotated[
        int | None, _loading("Of random:flash and random:pro, the first so many layers.", env="DSV4_LAYERS")
    ] = None
    tp: Annotated[
        int, _loading("Share the model among so many processes, each on a GPU of its own (or all on the CPU).",
                      env="DSV4_TP")
    ] = 1  # fmt: skip
    experts: Annotated[
        Experts,
        _loading("With --tp, of routed experts a rank has some of each (tp), or some of them (ep), to which rows of "
                 "prompts are sent (ep-a2a).", env="DSV4_EXPERTS"),
    ] = "tp"  # fmt: skip
    seed: Annotated[int, _loading("What sampling draws from.", env="DSV4_SEED")] = 0

    threads: Annotated[
        int | None,
        typer.Option(
            help="CPU threads.", envvar="DSV4_THREADS", min=1, rich_help_panel="Loading",
            show_default="all cores; 1 for a model that fits in a cache",
        ),
    ] = None  # fmt: skip

    def ranks(self) -> Mesh | None:
        """The ranks that share the model, None for one. To be called first, with the same result when called again:
        the process that starts them does not come back (see ranks.py).
        """
        return _ranks(self.tp, self.device, self.experts)

    def load(self, model: str) -> Model:
        """The model, and torch set to the threads asked for."""
        tp = self.ranks()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        elif tp is not None:  # with GPUs too: they plan prompts together, and threads without a core are waited for
            torch.set_num_threads(max(torch.get_num_threads() // tp.size, 1))
        return load(
            model,
            device=self.device,
            dtype=self.dtype,
            act=self.act,
            weights=self.weights,
            kv_quant=self.kv_quant,
            index_quant=self.index_quant,
            layers=self.layers,
            tp=tp,
        )

    def open(self, model: str, max_model_len: int | None = None) -> LLM:
        """An LLM for one sequence at a time."""
        llm = LLM(self.load(model), max_num_seqs=1, max_model_len=max_model_len, seed=self.seed)
        if self.threads is None and llm.weight_bytes_per_token < SMALL_BYTES:
            torch.set_num_threads(1)
        return llm


@cache
def _ranks(size: int, device: str, experts: Experts) -> Mesh | None:
    return start(size, device, experts)


@dataclass(frozen=True)
class ModelArgument:
    """Which model: positional, or -m, or DSV4_MODEL, or the embedded one."""

    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help=_MODEL_HELP, envvar="DSV4_MODEL", show_default=EMBEDDED)
    ] = None
    model_option: Annotated[str | None, typer.Option("--model", "-m", help="The same as MODEL.")] = None

    def resolve(self) -> str:
        """The model's name or path. Says so when nobody chose one."""
        if self.model_option is not None:
            return self.model_option
        return _chosen(self.model)


@dataclass(frozen=True)
class ModelOption:
    """Which model, for commands whose arguments are something else."""

    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help=_MODEL_HELP, envvar="DSV4_MODEL", show_default=EMBEDDED),
    ] = None

    def resolve(self) -> str:
        return _chosen(self.model)


def _chosen(model: str | None) -> str:
    if model is None:
        note(f"no model named: using {EMBEDDED}, the embedded one (small, for trying things out)")
    return model or EMBEDDED


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen. What is not given comes from the checkpoint's generation_config.json."""

    temperature: Annotated[float | None, _sampling("0 takes the most likely token.")] = None
    top_p: Annotated[float | None, _sampling("Keep the most likely tokens of this mass.")] = None
    top_k: Annotated[int | None, _sampling("Keep this many of the most likely tokens.")] = None
    min_p: Annotated[float | None, _sampling("Keep tokens this likely relative to the best.")] = None
    repetition_penalty: Annotated[float | None, _sampling("Divides the logits of tokens seen.")] = None
    presence_penalty: Annotated[float | None, _sampling("Subtracted once from tokens generated.")] = None
    frequency_penalty: Annotated[float | None, _sampling("Subtracted per occurrence.")] = None
    stop: Annotated[list[str], _sampling("Stop at this text; may be repeated.")] = field(default_factory=list)
    min_tokens: Annotated[int | None, _sampling("Do not stop earlier.")] = None
    ignore_eos: Annotated[bool, _sampling("Go on after the end of sequence.", "--ignore-eos")] = False

    def params(self, llm: LLM, seed: int | None, **more: Any) -> SamplingParams:
        """The checkpoint's defaults with these changes; `more` holds further SamplingParams fields."""
        changes = {**asdict(self), "seed": seed, **more}
        max_tokens = changes.pop("max_tokens", None)
        # None means "not given" for every option but max_tokens, where it is a value: as many as the context allows
        given = llm.defaults.sampling | {k: v for k, v in changes.items() if v is not None}
        return SamplingParams(**given, max_tokens=max_tokens)


def read_prompt(prompt: str | None, tp: Mesh | None = None) -> str:
    """The text of -p; `-` reads stdin to its end, which rank 0 has and tells the others."""
    if prompt == "-" and tp is not None:
        return tp.comm.tell("" if tp.rank else read_prompt(prompt))
    if prompt is None:
        raise typer.BadParameter('give a prompt with -p "text", or -p - to read it from stdin', param_hint="--prompt")
    if prompt != "-":
        return prompt
    try:
        return typer.get_text_stream("stdin").read()
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin is not UTF-8 text ({error})") from error
