"""Several ranks, however experts are divided: over gloo against one process; the parts of the weights; what cannot be
divided.
"""

import json
import subprocess
import sys
from pathlib import Path

import parallel_ranks
import pytest
import torch
from checkpoint_files import SMALL
from safetensors.torch import load_file

import dsv4
import dsv4.parallel.mesh as mesh_module
from dsv4.bench.report import Row, Run
from dsv4.bench.roofline import stored_bytes
from dsv4.checkpoint.faults import Faults
from dsv4.checkpoint.load import load_model_weights, open_source
from dsv4.checkpoint.names import expected_tensors
from dsv4.checkpoint.plan import make_plan, stack_name
from dsv4.checkpoint.synthetic import synthesize, synthetic_bytes
from dsv4.cli.ranks import start
from dsv4.config import ModelConfig
from dsv4.errors import CheckpointError, ConfigError, RequestError
from dsv4.parallel.launch import run_ranks
from dsv4.parallel.shard import Share
from dsv4.quant.weights import Weight
from dsv4.testing.checkpoints import FORMATS, write_random_checkpoint

# Divides by four in every format: FP8 shares of whole blocks (wq_b), and within one (wo_a, wo_b, experts).
FOUR = SMALL | {
    "vocab_size": 332, "hidden_size": 128, "num_attention_heads": 8, "head_dim": 128, "qk_rope_head_dim": 64,
    "q_lora_rank": 64, "o_groups": 4, "o_lora_rank": 32, "moe_intermediate_size": 128, "index_head_dim": 64,
    "n_routed_experts": 4,
}  # fmt: skip
HERE = Path(__file__).parent


@pytest.fixture(scope="module", params=[2, 4])
def run(request, tmp_path_factory):
    """(path, per rank: logits by mapping and setting, facts), of the embedded model by 2 ranks, a random one by 4."""
    folder, size = tmp_path_factory.mktemp("ranks"), request.param
    path = "nano" if size == 2 else str(write_random_checkpoint(folder / "model", FOUR, format="modelopt", mtp=False))
    assert run_ranks(size, [str(HERE / "parallel_ranks.py"), str(size), path, str(folder)]) == 0
    ranks = range(size)
    facts = [json.loads((folder / f"{rank}.json").read_text()) for rank in ranks]
    return path, [load_file(folder / f"{rank}.safetensors") for rank in ranks], facts


@pytest.fixture(scope="module")
def alone(run):
    return parallel_ranks.measure(run[0])


@pytest.mark.parametrize("experts", parallel_ranks.EXPERTS)
def test_ranks_give_the_logits_and_tokens_of_one_process(run, alone, experts):
    _, logits, facts = run
    expected, told = alone
    for name in ("exact", "nvfp4"):
        difference = (logits[0][f"{experts} {name}"] - expected[name]).norm() / expected[name].norm()
        assert difference < 1e-5, name
    assert facts[0][experts] == told


def test_ranks_agree_bit_for_bit(run):
    _, logits, facts = run
    for rank in range(1, len(logits)):
        assert len(logits[0]) == 11 and all(torch.equal(logits[0][name], logits[rank][name]) for name in logits[0])
        assert facts[rank] == facts[0]
    assert facts[0]["said"] == "what the first says, \u00fc" and facts[0]["sums"]
    assert "some of the experts (ep); a program takes some of each (tp)" in facts[0]["unfit"]


def test_many_rows_are_divided_between_seams_and_nothing_else_changes(run):
    """Chunks of 20, 20, 8 and 24 rows; a single one is every rank's. What is divided is summed in the same order."""
    path, logits, facts = run
    model, size = dsv4.load(path, **parallel_ranks.EXACT), len(logits)
    layers = len(model.config.layers)
    sites, rows = 2 * layers + 1, [20, 20, 8, *[1] * 12, 24]
    assert facts[0]["rows"] == [n // size if n > 1 else 1 for n in rows for _ in range(sites)]
    for name, expected in (
        ("logits", parallel_ranks.logits_of(model, 1)),
        ("observed", parallel_ranks.observed(model)),
    ):
        assert (logits[0][f"rows {name}"] - expected).norm() / expected.norm() < 1e-5, name
    assert (logits[0]["rows logits"] - logits[0]["tp exact"]).norm() / logits[0]["tp exact"].norm() < 1e-6


@pytest.mark.parametrize("experts", parallel_ranks.EXPERTS)
def test_bfloat16_is_as_near_to_float32_as_in_one_process(run, alone, experts):
    """Where a sum is rounded differs, so single roundings do; the error against float32 must not grow, chance apart."""
    _, logits, _ = run
    true, here = alone[0]["exact"], alone[0]["bfloat16"]
    assert (logits[0][f"{experts} bfloat16"] - true).norm() < 1.3 * (here - true).norm()


def joined(parts, split):
    """What the ranks hold together, as float64 values."""
    values = [part.dequantize(torch.float64) if isinstance(part, Weight) else part for part in parts]
    if split == "experts":
        return torch.cat(values)
    return torch.cat(values, -1 if split == "columns" else values[0].dim() - (2 if values[0].dim() > 1 else 1))


def splits_of(config, by_expert):
    """By name: along what the ranks' parts are joined."""
    specs = expected_tensors(config).values()
    return {stack_name(s.name): "experts" if by_expert and s.role == "expert" else s.split for s in specs}


@pytest.mark.parametrize("by_expert", [False, True])
@pytest.mark.parametrize("policy", ["native", "nvfp4"])
@pytest.mark.parametrize("format", FORMATS)
def test_shares_make_up_the_whole(tmp_path, format, policy, by_expert):
    write_random_checkpoint(tmp_path, FOUR, format=format, mtp=False)
    whole = load_model_weights(tmp_path, policy=policy)
    every = [Share(rank, 4, by_expert) for rank in range(4)]
    shares = [load_model_weights(tmp_path, policy=policy, share=share).weights for share in every]
    splits = splits_of(whole.config, by_expert)
    divided = 0
    for name, weight in whole.weights.items():
        parts = [share[name] for share in shares]
        split = splits[name]
        if split:
            divided += 1
            assert torch.equal(joined(parts, split), joined([weight], split)), name
            assert len({tuple(part.shape) for part in parts}) == 1 and parts[0].shape != weight.shape
        else:
            assert torch.equal(joined(parts[3:], split), joined([weight], split)), name
        assert all(t.is_contiguous() for t in (parts[0].tensors().values() if isinstance(parts[0], Weight) else ()))
    assert divided == 10 * len(whole.config.layers) + 1


def held_bytes(weights):
    return sum(weight.nbytes for weight in weights.values())


@pytest.mark.parametrize("by_expert", [False, True])
@pytest.mark.parametrize("format", ["official", "modelopt-all"])
def test_a_rank_reads_and_holds_its_bytes_alone(tmp_path, format, by_expert):
    write_random_checkpoint(tmp_path, FOUR, format=format, mtp=False)
    source, config = open_source(tmp_path, Faults())
    counts = []
    for share in (Share(), Share(1, 2, by_expert), Share(3, 4, by_expert)):
        planned = make_plan(source, config, faults := Faults(), share=share).nbytes
        assert not len(faults)
        assert planned == sum(nbytes for _, nbytes in stored_bytes(str(tmp_path), "native", share=share))
        held = held_bytes(load_model_weights(tmp_path, share=share).weights)
        counts.append(planned)
        assert planned == held, "every stored byte of the share, and no other, is held"
    assert counts[0] > counts[1] > counts[2]


@pytest.mark.parametrize("by_expert", [False, True])
def test_synthetic_shares_are_parts_of_the_same_values(by_expert):
    config = ModelConfig.from_dict(FOUR | {"moe_intermediate_size": 256, "o_lora_rank": 64})
    for policy in ("native", "nvfp4"):
        whole = dict(synthesize(config, policy))
        shares = [dict(synthesize(config, policy, share=Share(rank, 2, by_expert))) for rank in range(2)]
        splits = splits_of(config, by_expert)
        for name, weight in whole.items():
            if splits[name]:
                both = joined([share[name] for share in shares], splits[name])
                assert torch.equal(both, joined([weight], splits[name])), name
        assert held_bytes(shares[0]) == sum(synthetic_bytes(config, policy, share=Share(0, 2, by_expert)).values())
    for name in ("random:flash", "random:pro"):
        shares = [Share(0, size, by_expert) for size in (1, 2, 8)]
        per_rank = [sum(nbytes for _, nbytes in stored_bytes(name, "nvfp4", share=share)) for share in shares]
        assert per_rank[1] < 0.52 * per_rank[0] and per_rank[2] < 0.15 * per_rank[0]


def test_everything_that_does_not_divide_is_said_at_once():
    with pytest.raises(CheckpointError) as error:
        load_model_weights("random:tiny", share=Share(0, 4))
    text = str(error.value)
    for words in ("num_attention_heads = 6 does not divide by 4", "o_groups = 2", "vocab_size = 331"):
        assert words in text
    assert "ffn.experts.*.w2: 160 columns give shares of 40" in text and text.count("shared_experts.w2") == 1
    with pytest.raises(CheckpointError, match="o_groups = 8 does not divide by 3"):
        load_model_weights("random:flash", share=Share(0, 3))
    with pytest.raises(CheckpointError, match="n_routed_experts = 256 does not divide by 3"):
        load_model_weights("random:flash", share=Share(0, 3, by_expert=True))


def test_a_process_that_is_no_rank_is_told_how_to_become_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"lacks RANK.*torchrun --nproc-per-node 2"):
        mesh_module.join(2)
    there = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="tp = 2, but 4 processes were started"):
        mesh_module.join(2)
    with pytest.raises(ConfigError, match="each rank takes the GPU of its number"):
        mesh_module.join(4, "cuda:1")


def test_a_rank_that_fails_ends_the_others():
    sleepy = "import os, sys, time; sys.exit(7) if os.environ['RANK'] == '1' else time.sleep(60)"
    assert run_ranks(2, ["-c", sleepy]) == 7


def test_ranks_that_wait_for_ever_are_ended():
    assert run_ranks(2, ["-c", "import time; time.sleep(60)"], timeout=0.5) == 124


def test_the_command_line_starts_the_ranks_and_one_of_them_speaks():
    prompt = "def read(self):\n"
    options = ["-p", "-", "--dtype", "float32", "--max-tokens", "6", "--temperature", "0", "--ignore-eos", "--json"]
    command = [sys.executable, "-m", "dsv4.cli", "generate", "nano", *options, "--tp", "2", "--experts", "ep"]
    done = subprocess.run(command, input=prompt, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    with dsv4.LLM("nano", dtype="float32") as llm:
        params = dsv4.SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
        assert llm.generate(prompt, params)[0].outputs[0].token_ids == two["token_ids"]
        assert two["metrics"]["weight_bytes_per_token"] < 0.8 * llm.weight_bytes_per_token
    assert two["settings"]["tp"] == 2 and two["settings"]["experts"] == "ep"
    assert done.stderr.count("tok/s") == 2, "one line with both speeds"


def test_a_bench_names_how_experts_are_divided():
    runs = [Run("nano", 5, 2, "bf16", "A GPU", 1.0, "abc", "dsv4", experts) for experts in parallel_ranks.EXPERTS]
    assert [Row(run, {}).columns["tp"] for run in runs] == ["2", "2 ep", "2 ep-a2a"]


def test_experts_are_divided_among_ranks_only():
    with pytest.raises(RequestError, match="--experts ep divides experts among processes; give --tp with 2 or more"):
        start(1, "cpu", "ep")
