"""The engine's borders on a fake model: capacity, refusals, failures, aborts. Whatever happens, nothing stays held."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from fake_model import GREEDY, FakeModel, assert_nothing_is_held, engine, prompts, run

from dsv4.engine.params import SamplingParams
from dsv4.errors import Dsv4Error, KernelError, RequestError


def test_capacity_is_reserved_at_admission_and_the_queue_is_first_come_first_served() -> None:
    e = engine(max_total_tokens=60)
    big, small = SamplingParams(temperature=0, max_tokens=30), SamplingParams(temperature=0, max_tokens=2)
    first, second, third = e.add([2] * 20, big), e.add([3] * 20, big), e.add([4], small)
    e.step()
    assert [r.sequences[0].slot is not None for r in (first, second, third)] == [True, False, False]
    assert e.scheduler.reserved_tokens == 50
    while e.busy:
        e.step()
    assert first.first_scheduled_time < second.first_scheduled_time <= third.first_scheduled_time
    assert_nothing_is_held(e)


@pytest.mark.parametrize(
    "ids,max_tokens,words",
    [
        ([2] * 100, 16, ["100", "16", "116", "context holds 100"]),
        ([2] * 85, 16, ["85", "16", "101"]),
        ([2] * 100, None, ["100", "at least 1", "101"]),
        ([], 16, ["empty"]),
    ],
)
def test_what_can_never_fit_is_refused_with_the_numbers(
    ids: list[int], max_tokens: int | None, words: list[str]
) -> None:
    e = engine()
    with pytest.raises(RequestError) as caught:
        e.add(ids, SamplingParams(max_tokens=max_tokens))
    assert all(word in str(caught.value) for word in words)
    assert_nothing_is_held(e)


def test_max_tokens_none_uses_the_whole_context() -> None:
    (out,) = run(engine(), ([2] * 90, SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)))
    assert len(out.outputs[0].token_ids) == 10


@pytest.mark.parametrize("bad", [50, -1, True, 2.0, "x"])
def test_a_token_id_outside_the_vocabulary_is_refused(bad: Any) -> None:
    with pytest.raises(RequestError, match=r"not a token id in 0\.\.49"):
        engine().add([3, bad], GREEDY)
    for field in ({"stop_token_ids": [50]}, {"logit_bias": {50: 1.0}}):
        with pytest.raises(RequestError, match="not a token id"):
            engine().add([3], SamplingParams(**field))
    with pytest.raises(RequestError, match="logprobs = 51"):
        engine().add([3], SamplingParams(logprobs=51))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_stop_that_request_alone(bad: float) -> None:
    model = FakeModel()
    model.poison = {12: bad}
    e = engine(model)
    unlucky = SamplingParams(temperature=0, max_tokens=30, logprobs=1, ignore_eos=True)
    healthy, sick = e.add([7] * 20, GREEDY), e.add([6] * 9, unlucky)
    while e.busy:
        e.step()
    assert_nothing_is_held(e)
    assert healthy.error is None and healthy.output().outputs[0].token_ids == model.greedy([7] * 20, 8)
    assert isinstance(sick.error, KernelError)
    message = str(sick.error)
    assert all(part in message for part in ("request 1", "step 3", "9 prompt tokens", "1 of 50", "token 3"))
    assert len(sick.output().outputs[0].token_ids) == 3
    assert e.metrics.failed_requests == 1


def test_an_exception_out_of_the_model_frees_everything() -> None:
    model = FakeModel()
    e = engine(model, max_num_seqs=2)
    for ids in prompts(5):
        e.add(ids, GREEDY)
    model.fail_at = 4
    with pytest.raises(RuntimeError, match="the model broke"):
        while e.busy:
            e.step()
    assert_nothing_is_held(e)
    model.fail_at = None
    assert run(e, ([5], GREEDY))[0].outputs[0].token_ids == model.greedy([5], 8)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_abort_frees_the_slot_at_once_and_spares_the_others(steps: int) -> None:
    model = FakeModel()
    e = engine(model, max_num_seqs=2, prefill_chunk=8)
    requests = [e.add(ids, GREEDY) for ids in prompts(4, longest=20)]
    for _ in range(steps):
        e.step()
    gone = e.abort("1")
    assert gone is not None and gone.outputs[0].finish_reason == "abort" and gone.finished
    assert e.abort("1") is None and e.abort("no such request") is None
    while e.busy:
        e.step()
    assert_nothing_is_held(e)
    for i in (0, 2, 3):
        assert requests[i].output().outputs[0].token_ids == model.greedy(requests[i].prompt_ids, 8)


def test_a_request_id_in_use_is_refused() -> None:
    e = engine()
    e.add([3], GREEDY, request_id="a")
    with pytest.raises(RequestError, match="'a' is in use"):
        e.add([3], GREEDY, request_id="a")


def test_metrics_count_what_was_done() -> None:
    e = engine()
    before = e.metrics.copy()
    outputs = run(e, *[(p, GREEDY) for p in prompts(5)])
    done = e.metrics - before
    assert done.requests == 5 and done.failed_requests == 0
    assert done.prompt_tokens == sum(len(o.prompt_token_ids) for o in outputs)
    assert done.generated_tokens == 40 and done.decode_tokens == 35
    assert done.decode_steps < 35  # they ran together
    assert done.decode_seconds > 0 and done.decode_tokens_per_second > 0
    times = outputs[0].metrics
    assert times.arrival_time <= times.first_scheduled_time <= times.first_token_time <= times.finished_time


@pytest.mark.parametrize("name", ["max_num_seqs", "max_model_len", "prefill_chunk"])
@pytest.mark.parametrize("value", [0, -1, True, 1.5])
def test_limits_are_positive_integers(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name):
        engine(**{name: value})


@pytest.mark.parametrize("trial", range(15))
def test_random_mixtures_leave_nothing_behind(trial: int) -> None:
    """Admissions, aborts, refusals, failures in random order: what was said is right and nothing leaks."""
    rng, model = random.Random(trial), FakeModel()
    e = engine(model, max_num_seqs=rng.randint(1, 4), prefill_chunk=rng.randint(1, 20), max_total_tokens=150)
    if trial % 3 == 0:
        model.poison = {rng.randint(5, 40): math.nan}
    live = []
    for _ in range(60):
        action = rng.random()
        if action < 0.3:
            ids = [rng.randrange(2, 50) for _ in range(rng.randint(1, 70))]
            params = SamplingParams(temperature=0, max_tokens=rng.randint(1, 40), n=rng.randint(1, 2), ignore_eos=True)
            try:
                live.append(e.add(ids, params))
            except Dsv4Error as error:
                assert "context holds" in str(error)
        elif action < 0.35 and live:
            e.abort(rng.choice(live).request_id)
        else:
            e.step()
        assert sum(len(h) for h in e.cache.histories.values()) <= e.scheduler.reserved_tokens <= 150
    while e.busy:
        e.step()
    assert_nothing_is_held(e)
    model.poison = {}
    for request in live:
        assert request.finished
        for answer in request.output().outputs:
            assert answer.token_ids == model.greedy(request.prompt_ids, len(answer.token_ids))
