"""The engine's logic on a fake model whose logits depend on the whole history: batching, seeds, stopping, logprobs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fake_model import EOS, GREEDY, FakeModel, engine, prompts, run

from dsv4.engine.params import SamplingParams


def test_greedy_output_is_what_the_plain_loop_gives() -> None:
    model = FakeModel()
    many = prompts(13)
    for ids, out in zip(many, run(engine(model), *[(p, GREEDY) for p in many]), strict=True):
        assert out.prompt_token_ids == ids
        assert out.outputs[0].token_ids == model.greedy(ids, 8)
        assert (out.outputs[0].finish_reason, out.finished) == ("length", True)


@pytest.mark.parametrize(
    "limits", [{"max_num_seqs": 1}, {"prefill_chunk": 1}, {"prefill_chunk": 7}, {"max_total_tokens": 70}]
)
def test_output_does_not_depend_on_how_the_work_is_cut(limits: dict[str, int]) -> None:
    params = SamplingParams(temperature=1.2, top_p=0.9, seed=7, max_tokens=9, repetition_penalty=1.2, ignore_eos=True)
    jobs = [(p, params) for p in prompts(9)]
    expected = [o.outputs[0].token_ids for o in run(engine(max_num_seqs=16, max_total_tokens=4000), *jobs)]
    assert [o.outputs[0].token_ids for o in run(engine(**limits), *jobs)] == expected


def test_a_seed_gives_the_same_tokens_in_any_company() -> None:
    mine = (list(range(2, 12)), SamplingParams(temperature=1.0, seed=42, max_tokens=12, ignore_eos=True))
    alone = run(engine(), mine)[0].outputs[0].token_ids
    others = [
        (
            p,
            SamplingParams(
                temperature=0.3 * i, top_k=i, seed=i, max_tokens=3 + 2 * i, presence_penalty=1.0, ignore_eos=True
            ),
        )
        for i, p in enumerate(prompts(6))
    ]
    for place in (0, 3, 6):
        assert run(engine(), *others[:place], mine, *others[place:])[place].outputs[0].token_ids == alone
    other_seed = (mine[0], SamplingParams(temperature=1.0, seed=43, max_tokens=12, ignore_eos=True))
    assert run(engine(), other_seed)[0].outputs[0].token_ids != alone


def test_requests_without_a_seed_differ_and_repeat_with_the_engine_seed() -> None:
    params = SamplingParams(temperature=1.0, max_tokens=10, ignore_eos=True)
    first, second = (
        [o.outputs[0].token_ids for o in run(engine(seed=s), ([5], params), ([5], params))] for s in (3, 3)
    )
    assert first == second and first[0] != first[1]
    assert [o.outputs[0].token_ids for o in run(engine(seed=4), ([5], params), ([5], params))] != first


def test_n_gives_distinct_answers_of_which_the_first_is_that_of_n_1() -> None:
    params = {"temperature": 1.0, "seed": 5, "max_tokens": 10, "ignore_eos": True}
    (many,) = run(engine(), ([9, 8, 7], SamplingParams(n=6, **params)))
    (one,) = run(engine(), ([9, 8, 7], SamplingParams(**params)))
    assert [o.index for o in many.outputs] == list(range(6))
    assert len({tuple(o.token_ids) for o in many.outputs}) == 6
    assert many.outputs[0].token_ids == one.outputs[0].token_ids


def test_running_sequences_decode_in_one_batch_while_new_ones_prefill() -> None:
    model = FakeModel()
    e = engine(model, max_num_seqs=3, prefill_chunk=10, max_num_batched_tokens=20)
    for ids in ([2] * 6, [3] * 6, [4] * 25):
        e.add(ids, GREEDY)
    e.step()
    assert model.batches == [(2, 12)]  # the third prompt's chunk of 10 would not fit into 20
    e.step()
    assert model.batches[1:] == [(1, 10), (2, 2)]


SCRIPT = {(5, 6): [10, 11, EOS, 12, 20, 13, EOS, 14, 15, 16]}


@pytest.mark.parametrize(
    "options,expected,reason,stopped_by",
    [
        ({}, [10, 11, EOS], "stop", None),
        ({"stop_token_ids": [11]}, [10, 11], "stop", 11),
        ({"stop_token_ids": [20], "ignore_eos": True}, [10, 11, EOS, 12, 20], "stop", 20),
        ({"ignore_eos": True, "max_tokens": 6}, [10, 11, EOS, 12, 20, 13], "length", None),
        ({"max_tokens": 2}, [10, 11], "length", None),
        ({"max_tokens": 3}, [10, 11, EOS], "stop", None),
    ],
)
def test_stopping(options: dict[str, Any], expected: list[int], reason: str, stopped_by: int | None) -> None:
    (out,) = run(
        engine(FakeModel(script=SCRIPT)), ([5, 6], SamplingParams(temperature=0, **{"max_tokens": 9, **options}))
    )
    answer = out.outputs[0]
    assert (answer.token_ids, answer.finish_reason, answer.stop_reason) == (expected, reason, stopped_by)


def test_min_tokens_forbids_the_end_and_nothing_else() -> None:
    model = FakeModel(script={(5, 6): [EOS], (5, 6, 7): [EOS]})
    row = model.row([5, 6])
    row[EOS] = -math.inf
    second = int(row.argmax())
    (out,) = run(
        engine(model), ([5, 6], SamplingParams(temperature=0, min_tokens=1, max_tokens=5, logit_bias={7: 0.0}))
    )
    assert out.outputs[0].token_ids[0] == second
    for seed in range(20):
        params = SamplingParams(
            seed=seed, temperature=2.0, min_tokens=6, max_tokens=9, stop_token_ids=list(range(2, 25))
        )
        (out,) = run(engine(), ([5], params))
        assert not set(out.outputs[0].token_ids[:6]) & {EOS, *range(2, 25)}
        assert len(out.outputs[0].token_ids) > 6


def test_logit_bias_and_penalties_reach_the_sampler() -> None:
    (out,) = run(engine(), ([5], SamplingParams(temperature=0, logit_bias={33: 100}, max_tokens=5)))
    assert out.outputs[0].token_ids == [33] * 5
    params = SamplingParams(temperature=0, logit_bias={33: 50, 34: 49}, presence_penalty=2.0, max_tokens=2)
    (out,) = run(engine(), ([5], params))
    assert out.outputs[0].token_ids == [33, 34]
    params = SamplingParams(temperature=0, logit_bias={33: 50, 34: 49.5}, frequency_penalty=0.2, max_tokens=24)
    tokens = run(engine(FlatModel()), ([5], params))[0].outputs[0].token_ids
    assert tokens == [33, 33, 33] + [34, 33] * 10 + [34]  # 33 leads by 0.5, which is 2.5 occurrences
    params = SamplingParams(temperature=0, logit_bias={33: 50, 34: 49}, repetition_penalty=1.5, max_tokens=1)
    for prompt, expected in (([33], [34]), ([32], [33])):  # the prompt counts
        assert run(engine(FlatModel()), (prompt, params))[0].outputs[0].token_ids == expected


class FlatModel(FakeModel):
    def row(self, history: Any) -> torch.Tensor:
        return torch.zeros(self.config.vocab_size)


def test_logprobs_are_those_of_the_raw_logits() -> None:
    model = FakeModel()
    (out,) = run(
        engine(model), ([5, 6, 7], SamplingParams(temperature=0.5, seed=1, logprobs=3, max_tokens=6, ignore_eos=True))
    )
    answer, history, total = out.outputs[0], [5, 6, 7], 0.0
    assert answer.logprobs is not None and len(answer.logprobs) == 6
    for token, candidates in zip(answer.token_ids, answer.logprobs, strict=True):
        truth = model.row(history).double().log_softmax(-1)
        best = truth.topk(3).indices.tolist()
        assert next(iter(candidates)) == token and set(candidates) == {token, *best}
        for candidate, entry in candidates.items():
            assert entry.logprob == pytest.approx(truth[candidate].item(), abs=1e-5)
            assert entry.rank == 1 + int((truth > truth[candidate]).sum())
        total += truth[token].item()
        history.append(token)
    assert answer.cumulative_logprob == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_prompt_logprobs_cover_every_prompt_token_but_the_first(chunk: int) -> None:
    model, ids = FakeModel(), prompts(1)[0][:11] + [9] * 11
    params = SamplingParams(temperature=0, prompt_logprobs=2, max_tokens=2, n=2)
    out, other = run(engine(model, prefill_chunk=chunk), (ids, params), ([4, 5], GREEDY))
    assert out.prompt_logprobs is not None and other.prompt_logprobs is None
    assert out.prompt_logprobs[0] is None and len(out.prompt_logprobs) == len(ids)
    for i in range(1, len(ids)):
        truth, candidates = model.row(ids[:i]).double().log_softmax(-1), out.prompt_logprobs[i]
        assert candidates is not None
        assert set(candidates) == {ids[i], *truth.topk(2).indices.tolist()}
        assert candidates[ids[i]].logprob == pytest.approx(truth[ids[i]].item(), abs=1e-5)
