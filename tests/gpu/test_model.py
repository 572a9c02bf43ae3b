"""The embedded model on the GPU against itself on the CPU: logits, greedy text, four-bit activations."""

import pytest
import torch

import dsv4

PROMPTS = [
    "def read(self, path):\n",
    "import os\n\n\nclass Cache:\n",
    "The quick way to install the package is",
    "    for key, value in items.items():\n",
    'def test_parse():\n    """',
    "Returns the number of",
    "try:\n    import json\nexcept",
    "# Licensed under the Apache License, Version 2.0\n",
]
WHERE = [("cpu", "bfloat16"), ("cuda", "bfloat16"), ("cpu", "float32")]
NEW_TOKENS = 256
TEACHER_FORCED = 48  # tokens of the prefill; the others are decoded one by one


def greedy(device: str, act: str) -> list[list[int]]:
    params = dsv4.SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    with dsv4.LLM("nano", device=device, act=act, max_num_seqs=1) as llm:
        return [
            [*out.prompt_token_ids, *out.outputs[0].token_ids]
            for prompt in PROMPTS
            for out in llm.generate(prompt, params)
        ]


@pytest.fixture(scope="module", params=["bf16", "nvfp4"])
def act(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def texts(act) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids, prompt included, that the CPU and the GPU write."""
    return greedy("cpu", act), greedy("cuda", act)


@pytest.fixture(scope="module")
def logits(act, texts) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """On the CPU's text: logits [T, V] of the CPU, of the GPU, and of the CPU without BF16 roundings."""
    models = [dsv4.load("nano", device=d, act=act, dtype=t) for d, t in WHERE]
    return [tuple(m.logits(ids[:-1], prefill=TEACHER_FORCED).cpu() for m in models) for ids in texts[0]]


def rms(differences: list[torch.Tensor]) -> float:
    return float(torch.cat([d.flatten() for d in differences]).square().mean().sqrt())


def test_bfloat16_on_the_gpu_is_as_good_as_on_the_cpu(logits):
    """Sums in another order flip BF16 roundings, as often for the better as for the worse: over all texts the GPU
    must lie no farther from the CPU without BF16 roundings (float32) than the CPU with them does, chance apart (20 %).
    """
    here, there = rms([cpu - exact for cpu, _, exact in logits]), rms([gpu - exact for _, gpu, exact in logits])
    between = rms([cpu - gpu for cpu, gpu, _ in logits])
    print(f"rms from float32: CPU {here:.4f}, GPU {there:.4f}; from one another {between:.4f}")
    assert there <= 1.2 * here


def test_greedy_text_is_the_same_up_to_a_tie(texts, logits):
    """The first token that differs must be a tie: its margin on the CPU within what BF16 moves logits there."""
    for cpu, gpu, (rows, _, exact) in zip(*texts, logits, strict=True):
        if cpu == gpu:
            print("256 equal tokens")
            continue
        first = next(i for i, (a, b) in enumerate(zip(cpu, gpu, strict=True)) if a != b)
        row, true = rows[first - 1], exact[first - 1]
        margin = abs(float(row[cpu[first]] - row[gpu[first]]))
        noise = float((row - true).abs().max())
        print(f"token {first}: margin {margin:.4f}, BF16 moves logits here by up to {noise:.4f}")
        assert margin <= 2 * noise
