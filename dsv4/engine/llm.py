"""LLM: the engine as one object for programs, in the manner of vLLM's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from dsv4.checkpoint.load import Policy
from dsv4.engine.chat import ChatPrompt, with_messages
from dsv4.engine.defaults import GenerationDefaults
from dsv4.engine.engine import Engine
from dsv4.engine.metrics import RunMetrics, weight_bytes_per_token
from dsv4.engine.output import RequestOutput
from dsv4.engine.params import SamplingParams
from dsv4.engine.progress import progress_bar
from dsv4.engine.prompts import Prompt, PromptLike, find_tokenizer, parse_prompts, require_tokenizer
from dsv4.engine.request import Request
from dsv4.engine.scheduler import Limits
from dsv4.engine.stream import ChatStream, TextStream
from dsv4.errors import RequestError
from dsv4.model import Model, load
from dsv4.parallel.mesh import Mesh
from dsv4.text.tokenizer import Tokenizer

Params = SamplingParams | Sequence[SamplingParams] | None
Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A model ready to generate.

        with dsv4.LLM("nano") as llm:
            [out] = llm.generate("def read(self, path):", dsv4.SamplingParams(max_tokens=64))
            print(out.outputs[0].text)

    model            a checkpoint folder, "nano", "random:tiny", or a loaded Model (then the load options are not used)
    device ... tp    as for dsv4.load; with `tp`, every rank makes the same calls and gets the same answers
    max_num_seqs     sequences that run at once; more wait
    max_model_len    tokens of prompt and output together, default the model's max_position_embeddings
    max_total_tokens cache entries of all running sequences, default enough for one of max_model_len and at most
                     DEFAULT_TOTAL_TOKENS beyond that
    seed             what requests without a seed of their own draw from

    A batch gives what its members give alone as far as the logits agree: in float32 they differ by the last bits that
    another batch size brings, which hardly ever matters; in bfloat16 such a bit may flip a rounding and then a token.
    Not for use from several threads at once. Every failure is a Dsv4Error; whatever happens, nothing stays allocated to
    a request that is over.
    """

    DEFAULT_TOTAL_TOKENS = 65536

    def __init__(
        self,
        model: str | Path | Model = "nano",
        *,
        device: str = "cpu",
        dtype: str = "bfloat16",
        act: str = "bf16",
        weights: Policy = "native",
        kv_quant: bool = True,
        index_quant: bool = True,
        layers: int | None = None,
        tp: Mesh | None = None,
        max_num_seqs: int = 8,
        max_model_len: int | None = None,
        max_total_tokens: int | None = None,
        max_num_batched_tokens: int = 2048,
        prefill_chunk: int = 512,
        seed: int = 0,
    ):
        if isinstance(model, str | Path):
            model = load(
                str(model),
                device=device,
                dtype=dtype,
                act=act,
                kv_quant=kv_quant,
                index_quant=index_quant,
                weights=weights,
                layers=layers,
                tp=tp,
            )
        self.folder = model.path
        self.tokenizer = find_tokenizer(self.folder)
        self.defaults = GenerationDefaults.of(model.config, self.folder)
        longest = model.config.max_position_embeddings
        if max_model_len is None:
            max_model_len = longest if max_total_tokens is None else min(longest, max_total_tokens)
        if max_model_len > longest:
            raise RequestError(f"max_model_len = {max_model_len} is more than the model's {longest} positions")
        if max_total_tokens is None:
            max_total_tokens = max(max_model_len, min(max_num_seqs * max_model_len, self.DEFAULT_TOTAL_TOKENS))
        limits = Limits(max_num_seqs, max_model_len, max_total_tokens, max_num_batched_tokens, prefill_chunk)
        self._engine: Engine | None = Engine(
            model, limits, tokenizer=self.tokenizer, eos_ids=self.defaults.eos_ids, seed=seed
        )
        self._chat: ChatPrompt | None = None
        self.last_run = RunMetrics()

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise RequestError("this LLM is closed; make a new one")
        return self._engine

    @property
    def model(self) -> Model:
        return self.engine.model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop every request, the cache and the model; the object is of no use afterwards. Twice is as good as once."""
        if self._engine is not None:
            self._engine.abort_all()
            self._engine = None

    @cached_property
    def weight_bytes_per_token(self) -> int:
        """Stored bytes of linear weights that one decoded token of one sequence reads."""
        return weight_bytes_per_token(self.model)

    def get_tokenizer(self) -> Tokenizer:
        return require_tokenizer(self.tokenizer)

    def get_default_sampling_params(self) -> SamplingParams:
        """The checkpoint's generation_config.json as parameters: what is used where none are given."""
        return self.defaults.params()

    def get_metrics(self) -> RunMetrics:
        """Counters since the start; `last_run` holds those of the last generate, chat or stream."""
        return self.engine.metrics.copy()

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Complete prompts, together, and return the outputs in their order.

        prompts          a string, token ids, {"prompt": ...}, {"prompt_token_ids": ...}, or a list of these
        sampling_params  one for all, or one per prompt; None takes the checkpoint's defaults
        Raises the first error, after every request of this call has been dropped.
        """
        return self._run(parse_prompts(prompts, self.tokenizer), sampling_params, use_tqdm)

    def stream(self, prompt: PromptLike, sampling_params: SamplingParams | None = None) -> TextStream:
        """Complete one prompt and give its text piece by piece."""
        self.get_tokenizer()
        prompts = parse_prompts(prompt, self.tokenizer)
        if len(prompts) != 1:
            raise RequestError(f"a stream takes one prompt, got {len(prompts)}; use generate")
        return TextStream(self.engine, prompts[0], sampling_params or self.get_default_sampling_params())

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: Params = None,
        *,
        thinking: bool = True,
        use_tqdm: bool = False,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them. `outputs[i].text` is what the model wrote, `outputs[i].message`
        the same as an OpenAI-shaped message with reasoning_content, content and tool_calls.

        messages   OpenAI-shaped dicts
        thinking   let the model reason before it answers
        options    as for dsv4.text.encode_segments: drop_thinking, reasoning_effort, tools, response_format,
                   continue_final_message
        """
        single = not messages or isinstance(messages[0], Mapping)
        many: Sequence[Any] = [messages] if single else messages
        prompts = [self._chat_prompt().encode(m, thinking, options) for m in many]
        return [with_messages(output, thinking) for output in self._run(prompts, sampling_params, use_tqdm)]

    def stream_chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        *,
        thinking: bool = True,
        **options: Any,
    ) -> ChatStream:
        """Answer one conversation piece by piece: reasoning, content, complete tool calls. Arguments as for chat."""
        prompt = self._chat_prompt().encode(messages, thinking, options)
        return ChatStream(
            TextStream(self.engine, prompt, sampling_params or self.get_default_sampling_params()), thinking
        )

    def _chat_prompt(self) -> ChatPrompt:
        if self._chat is None:
            self._chat = ChatPrompt(self.get_tokenizer(), self.folder)
        return self._chat

    def _run(self, prompts: list[Prompt], params: Params, use_tqdm: bool) -> list[RequestOutput]:
        engine, before = self.engine, self.get_metrics()
        requests: list[Request] = []
        try:
            for prompt, one in zip(prompts, self._per_prompt(params, len(prompts)), strict=True):
                requests.append(engine.add(prompt.token_ids, one, prompt=prompt.text))
            running = set(map(id, requests))
            with progress_bar("generating", len(requests), shown=use_tqdm) as advance:
                while running and engine.busy:
                    for sequence in engine.step():
                        request = sequence.request
                        if request.error is not None and id(request) in running:
                            raise request.error
                        if request.finished and id(request) in running:
                            running.remove(id(request))
                            advance()
        finally:
            for request in requests:
                engine.abort(request.request_id)
            self.last_run = engine.metrics - before
        return [request.output() for request in requests]

    def _per_prompt(self, params: Params, count: int) -> Sequence[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or self.get_default_sampling_params()] * count
        if len(params) != count:
            raise RequestError(f"{len(params)} sampling parameters for {count} prompts; give one for all, or one each")
        return params
