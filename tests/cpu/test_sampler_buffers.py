"""SamplerBuffers, whose rows stay in place for a captured step, against the rows the engine makes anew."""

import pytest
import torch

from dsv4.engine.params import SamplingParams
from dsv4.engine.request import Request, Sequence
from dsv4.engine.sampler import Sampler, SamplerBuffers
from dsv4.errors import RequestError

VOCAB = 50
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=99),
    SamplingParams(temperature=0.8, top_k=5, top_p=0.9, max_tokens=99),
    SamplingParams(temperature=1.3, min_p=0.05, repetition_penalty=1.4, frequency_penalty=0.3, max_tokens=99),
    SamplingParams(temperature=0.0, presence_penalty=1.0, logit_bias={3: 4.0, 7: -100.0}, max_tokens=99),
    SamplingParams(temperature=1.0, min_tokens=6, max_tokens=99, logit_bias={9: 2.5}),
]


def sequence(params: SamplingParams, seed: int) -> Sequence:
    stop_ids = frozenset(range(0, VOCAB, 2)) if params.min_tokens else frozenset()
    request = Request(f"r{seed}", None, [1, 2, 2, 5 + seed], params, seed, 99, frozenset(), stop_ids)
    return request.sequences[0]


def test_a_captured_steps_tokens_are_the_samplers() -> None:
    """Rows come and go between steps; row 2 is idle at first, and its slot is never written."""
    generator = torch.Generator().manual_seed(1)
    buffers, sampler = SamplerBuffers(6, VOCAB, "cpu"), Sampler(VOCAB)
    rows: dict[int, Sequence] = {row: sequence(PARAMS[row], row) for row in (0, 1, 3, 4)}
    for row, s in rows.items():
        buffers.take(row, s)
    inputs, positions = torch.zeros(5, dtype=torch.int64), torch.arange(5)
    ring, step = torch.full((4, 6), -9), torch.zeros(1, dtype=torch.int64)
    for at in range(12):
        if at == 4:
            rows[2] = sequence(PARAMS[2], 2)
            buffers.take(2, rows[2])
        if at == 8:
            rows[0] = sequence(PARAMS[4], 17)
            buffers.take(0, rows[0])
        buffers.upload()
        logits = torch.randn(5, VOCAB, generator=generator) * 3
        slots = torch.tensor([row if row in rows else -1 for row in range(5)])
        tokens = buffers.sample(logits)
        buffers.advance(tokens, slots, inputs, positions, ring, step)
        used = sorted(rows)
        expected = sampler([rows[row] for row in used], logits[used])
        assert tokens[used].tolist() == inputs[used].tolist() == ring[at % 4, used].tolist() == expected.tolist()
        for row, token in zip(used, expected.tolist(), strict=True):
            rows[row].token_ids.append(token)
        assert buffers.counter[used].tolist() == [len(rows[row].token_ids) for row in used]
        assert positions.tolist() == [row + (max(at - 3, 0) if row == 2 else at + 1) for row in range(5)]
    assert ring[:, 5].eq(-9).all() and step.item() == 12


def test_counters_of_other_rows_survive_an_upload() -> None:
    buffers = SamplerBuffers(2, VOCAB, "cpu")
    buffers.take(0, sequence(PARAMS[1], 0))
    buffers.upload()
    buffers.counter += 7
    buffers.take(1, sequence(PARAMS[2], 1))
    buffers.upload()
    assert buffers.counter.tolist() == [7, 0]
    buffers.clear(0)
    buffers.upload()
    assert buffers.temperature[0] == 0 and buffers.top_k[0] == 0 and buffers.counter[0] == 0


def test_more_stop_ids_than_a_row_holds_are_refused() -> None:
    buffers = SamplerBuffers(1, VOCAB, "cpu", max_stops=4)
    with pytest.raises(RequestError, match="min_tokens can hold back 4 stop tokens, the request has 5"):
        buffers.set(0, PARAMS[4], seed=0, stop_ids=range(5))
