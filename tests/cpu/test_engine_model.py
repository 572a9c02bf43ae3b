"""The engine on the real model with random weights: its tokens are those of Model.logits, alone and in company."""

from __future__ import annotations

import random

import pytest

import dsv4
from dsv4 import LLM, SamplingParams
from dsv4.errors import RequestError
from dsv4.model import Model


@pytest.fixture(scope="module")
def model() -> Model:
    # float32: in bfloat16 another batch size flips a rounding now and then, and with it a token
    return dsv4.load("random:tiny", dtype="float32")


def prompts(model: Model, count: int) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(model.config.vocab_size) for _ in range(rng.randint(1, 200))] for _ in range(count)]


def make(model: Model, **options: int) -> LLM:
    return LLM(model, **{"max_num_seqs": 3, "max_model_len": 300, **options})


def test_greedy_tokens_are_the_argmax_of_teacher_forced_logits(model: Model) -> None:
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    with make(model, prefill_chunk=64) as llm:
        many = prompts(model, 5)
        for ids, out in zip(many, llm.generate(many, params), strict=True):
            tokens = out.outputs[0].token_ids
            logits = model.logits([*ids, *tokens])
            assert logits[len(ids) - 1 : -1].argmax(-1).tolist() == tokens
        assert llm.engine.cache.free_slots == 3


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
        SamplingParams(temperature=0.8, top_p=0.9, top_k=40, seed=5, max_tokens=20, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=6, n=2, presence_penalty=0.5, max_tokens=20, ignore_eos=True),
    ],
    ids=["greedy", "filtered", "n=2"],
)
def test_a_batch_gives_what_its_members_give_alone(model: Model, params: SamplingParams) -> None:
    many = prompts(model, 6)
    with make(model) as llm, make(model, max_num_seqs=1, prefill_chunk=50) as single:
        together = [[a.token_ids for a in out.outputs] for out in llm.generate(many, params)]
        alone = [[a.token_ids for a in single.generate(ids, params)[0].outputs] for ids in many]
    assert together == alone


def test_logprobs_are_those_of_the_model(model: Model) -> None:
    (ids,) = prompts(model, 1)
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=0, prompt_logprobs=1, ignore_eos=True)
    with make(model, prefill_chunk=32) as llm:
        (out,) = llm.generate(ids, params)
    whole = [*ids, *out.outputs[0].token_ids]
    truth = model.logits(whole).double().log_softmax(-1)
    assert out.prompt_logprobs is not None and out.outputs[0].logprobs is not None
    entries = [*out.prompt_logprobs[1:], *out.outputs[0].logprobs]
    for at, (token, candidates) in enumerate(zip(whole[1:], entries, strict=True)):
        assert candidates is not None
        assert candidates[token].logprob == pytest.approx(truth[at, token].item(), abs=2e-4)


def test_slots_are_reused_without_a_trace(model: Model) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    first, *others = prompts(model, 4)
    with make(model, max_num_seqs=1) as llm:
        fresh = llm.generate(first, params)[0].outputs[0].token_ids
        llm.generate(others, params)
        with pytest.raises(RequestError, match="context holds 300"):
            llm.generate([[1] * 299], params)
        assert llm.generate(first, params)[0].outputs[0].token_ids == fresh


def test_llm_loads_by_name() -> None:
    with LLM("random:tiny", max_model_len=64, act="nvfp4", kv_quant=False) as llm:
        assert llm.model.settings.act == "nvfp4" and not llm.model.settings.kv_quant
        (out,) = llm.generate([3, 4], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
        assert len(out.outputs[0].token_ids) == 2
        with pytest.raises(RequestError, match=r"no tokenizer\.json"):
            llm.generate("text")
