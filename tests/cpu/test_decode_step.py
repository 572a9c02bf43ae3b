"""The decode step on fixed buffers, through the twins: what it says, whoever comes and goes beside it."""

import pytest
import torch

from dsv4 import LLM, SamplingParams
from dsv4.config import ModelConfig
from dsv4.engine import decoder as decoder_module
from dsv4.engine.decoder import SHORT, Decoder, buckets
from dsv4.engine.step import DecodeStep
from dsv4.errors import CapacityError, KernelError
from dsv4.kernels.index_topk.index_topk import TOGETHER
from dsv4.kernels.sparse_attention.sparse_attention import longer
from dsv4.kvcache.layout import PAGE_ENTRIES, entries, pages
from dsv4.model import load


@pytest.fixture(scope="module")
def nano():
    return load("nano", dtype="float32")


def test_buckets_double_up_to_what_is_wanted():
    assert buckets(1) == [1]
    assert buckets(3) == [1, 2, 4]
    assert buckets(64) == [1, 2, 4, 8, 16, 32, 64]
    assert buckets(65) == [1, 2, 4, 8, 16, 32, 64, 128]


PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=9),
    SamplingParams(temperature=0.9, seed=4, top_k=20, max_tokens=14),
    SamplingParams(temperature=0.7, seed=5, top_p=0.8, repetition_penalty=1.3, max_tokens=3, n=2),
    SamplingParams(temperature=0.0, frequency_penalty=0.6, logit_bias={7: 3.0}, max_tokens=12, min_tokens=4),
    SamplingParams(temperature=1.0, seed=6, min_p=0.1, max_tokens=6, logprobs=2),
]
PROMPTS = ["def read(self", "import os", "class A:\n", "The number of", "x = 1\n" * 30]


def said(model, static: bool, taken: list | None = None) -> list[tuple]:
    """taken: the steps that ran, by rows and longest sequence."""
    with LLM(model, max_num_seqs=3, max_model_len=400) as llm:
        assert llm.engine.decoder is None  # on a CPU
        if static:
            llm.engine.decoder = decoder = Decoder(model, llm.engine.cache, llm.engine.limits)
            for step in decoder._steps if taken is not None else []:
                run, kind = step.run, (step.rows, step.static.max_length)
                step.run = lambda run=run, kind=kind: (taken.append(kind), run())
        outputs = llm.generate(PROMPTS, PARAMS)
    return [
        (o.token_ids, o.text, o.finish_reason, o.cumulative_logprob and round(o.cumulative_logprob, 3))
        for out in outputs
        for o in out.outputs
    ]


def test_an_engine_says_the_same_on_fixed_buffers(nano):
    """Six sequences in three slots: rows change hands, buckets change, every sampling rule is met."""
    assert said(nano, static=True) == said(nano, static=False)


def test_short_sequences_have_steps_of_their_own_until_one_is_longer(nano, monkeypatch):
    monkeypatch.setattr(decoder_module, "SHORT", 24)
    taken = []
    assert said(nano, static=True, taken=taken) == said(nano, static=False)
    assert {most for _, most in taken} == {24, 400} and all(rows in (1, 2, 4) for rows, _ in taken)
    assert (4, 400) in taken and taken[-1][1] == 24


def test_so_many_tokens_are_short_for_the_kernels():
    flash = ModelConfig.from_name("random:flash")
    assert pages(SHORT, 4) * PAGE_ENTRIES <= TOGETHER < entries(SHORT + 4, 4)
    assert not longer(flash.sliding_window, entries(SHORT, 128)) and not longer(flash.sliding_window, flash.index_topk)


def test_steps_go_on_by_themselves(nano):
    """Staged once, then every run takes the token before it; a second sequence and padding beside it change nothing."""
    ids = torch.arange(40, 60)
    alone, both = nano.new_cache(1, 64), nano.new_cache(2, 128)
    for cache, slots in ((alone, 1), (both, 2)):
        for _ in range(slots):
            nano.forward([(cache.acquire(), ids)], cache)
    tokens = []
    for cache, slots, rows in ((alone, [0], 1), (both, [1, 0], 4)):
        step = DecodeStep(nano, cache, rows, max_length=64)
        step.stage(slots, [7] * len(slots))
        tokens.append([])
        for _ in range(6):
            cache.reserve([(slot, 1) for slot in slots])
            step.run()
            for slot in slots:
                cache.advance(slot, 1)
            tokens[-1].append(step.wait()[0])
    assert tokens[0] == tokens[1]
    assert step.outputs()["logits"].shape == (4, nano.config.vocab_size)


def test_what_does_not_fit_is_refused(nano):
    step = DecodeStep(nano, nano.new_cache(2, 64), 2)
    with pytest.raises(CapacityError, match="takes 1 to 2 sequences with a token each; got 3 slots and 3 tokens"):
        step.stage([0, 1, 2], [1, 2, 3])
    with pytest.raises(CapacityError, match="got 1 slots and 0 tokens"):
        step.stage([0], [])
    with pytest.raises(KernelError, match="captured on a CUDA device; this step runs on cpu"):
        step.capture()
