"""Two GPUs, experts divided either way: the embedded model against itself on one, collectives inside graphs."""

import json
from pathlib import Path

import pytest
import torch
import tp_ranks
from safetensors.torch import load_file, save_file

import dsv4
from dsv4.parallel.launch import run_ranks

SIZE = 2
SECONDS = 240  # a rank that waits for another for ever fails the tests
pytestmark = pytest.mark.skipif(torch.cuda.device_count() < SIZE, reason=f"needs {SIZE} GPUs")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Text of one GPU and its logits there, with roundings and without; per rank, logits on that text for each way of
    dividing experts, and facts."""
    folder = tmp_path_factory.mktemp("ranks")
    model = dsv4.load("nano", device="cuda")
    text = {str(i): torch.tensor(ids) for i, ids in enumerate(tp_ranks.greedy(model))}
    alone = {name: model.logits(ids, prefill=48).cpu() for name, ids in text.items()}
    exact = dsv4.load("nano", dtype="float32")
    true = {name: exact.logits(ids, prefill=48) for name, ids in text.items()}
    save_file(text, folder / "text.safetensors")
    assert run_ranks(SIZE, [str(Path(tp_ranks.__file__)), str(SIZE), str(folder)], timeout=SECONDS) == 0
    facts = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(SIZE)]
    logits = [load_file(folder / f"{rank}.safetensors") for rank in range(SIZE)]
    return text, alone, true, logits, facts


def rms(differences):
    return float(torch.cat([d.flatten() for d in differences]).square().mean().sqrt())


def test_ranks_agree_bit_for_bit(run):
    text, _, _, logits, facts = run
    assert logits[0].keys() == {f"{experts} {name}" for experts in tp_ranks.EXPERTS for name in text}
    assert all(torch.equal(logits[0][name], logits[1][name]) for name in logits[0])
    assert facts[0]["tokens"] == facts[1]["tokens"]


@pytest.mark.parametrize("experts", tp_ranks.EXPERTS)
def test_two_gpus_choose_the_tokens_of_one(run, experts):
    """Partial sums are rounded elsewhere, so logits move within the noise of BF16; a token may change only where the
    two best of one GPU are nearer to each other than that noise."""
    text, alone, _, logits, facts = run
    found = {name: logits[0][f"{experts} {name}"] for name in text}
    noise = rms([found[name] - alone[name] for name in text])
    for name in text:
        best = alone[name].topk(2).values
        for row in (found[name].argmax(-1) != alone[name].argmax(-1)).nonzero().flatten().tolist():
            assert best[row, 0] - best[row, 1] < 6 * noise, f"text {name}, token {row}"
    written = [list(ids) for ids in facts[0]["tokens"][experts]]
    alike = sum(a == b for name, ids in text.items() for a, b in zip(ids.tolist(), written[int(name)], strict=True))
    assert alike > 0.5 * sum(len(ids) for ids in text.values())


@pytest.mark.parametrize("experts", tp_ranks.EXPERTS)
def test_two_gpus_are_as_near_to_float32_as_one(run, experts):
    """By the middle one of all tokens: where a rounding changes what an indexer picks, one token's logits move by a
    multiple of that, in either run, and decide about every mean."""
    text, alone, true, logits, _ = run

    def middle(found):
        return torch.cat([(found[name] - true[name]).square().mean(-1) for name in text]).sqrt().median()

    assert middle({name: logits[0][f"{experts} {name}"] for name in text}) < 1.1 * middle(alone)


def test_captured_sums_replay(run):
    for rows in ("1", "3", "64", "300"):
        sums = [facts["sums"][rows] for facts in run[4]]
        assert sums[0]["bits"] == sums[1]["bits"], rows
        assert all(one["replay_equals_eager"] and one["worst"] < 2**-7 for one in sums), rows


def test_sums_apart_have_the_bits_of_the_others(run):
    assert all(all(facts["apart"]) for facts in run[4])


def test_captured_seams_add_up_like_all_reduce(run):
    for rows, seams in run[4][0]["seams"].items():
        assert seams["bits"] == run[4][1]["seams"][rows]["bits"], rows
        assert seams["replay_equals_apart"] and run[4][1]["seams"][rows]["replay_equals_apart"], rows


def test_captured_gathers_replay(run):
    assert all(all(facts["gathers"]) for facts in run[4])
