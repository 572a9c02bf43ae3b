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


WHERE = [("cpu", "bfloat16"), ("cuda", "bfloat16"), ("cpu", "float32")]


def test_logits_differ_less_than_bfloat16_itself_does(logits):
    """Sums in another order flip BF16 roundings; taking all of these away (float32) moves the logits by what such
    flips can amount to, so the two BF16 runs must lie closer to each other than that, on average over a text.
    """
    for cpu, gpu, exact in logits:
        flips, noise = (cpu - gpu).square().mean().sqrt(), (cpu - exact).square().mean().sqrt()
        print(f"rms GPU against CPU {flips:.4f}, BF16 against float32 {noise:.4f}, of {cpu.std():.2f}")
        assert flips <= noise


def test_greedy_text_is_the_same_up_to_a_tie(texts, logits):
    """The first token that differs must be a tie: its margin on the CPU within what BF16 moves those two logits."""
    for cpu, gpu, (rows, _, exact) in zip(*texts, logits, strict=True):
        if cpu == gpu:
            print("256 equal tokens")
            continue
        first = next(i for i, (a, b) in enumerate(zip(cpu, gpu, strict=True)) if a != b)
        row, true = rows[first - 1], exact[first - 1]
        margin = float(row[cpu[first]] - row[gpu[first]])
        noise = float((row - true).abs().max())
        print(f"token {first}: margin {margin:.4f}, BF16 moves logits here by up to {noise:.4f}")
        assert 0 <= margin <= 2 * noise
