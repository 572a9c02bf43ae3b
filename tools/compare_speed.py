"""How fast `dsv4` writes text on this CPU, beside transformers on the same BF16 weights in the same process.

    python tools/compare_speed.py [MODEL] [--tokens 64] [--rounds 5] [--threads 1] [--dtype bfloat16]

The checkpoint's weights are decoded to BF16 and written, under DeepSeek's names, to a temporary folder that both load.
Rounds alternate; medians count. Both decode greedily, one sequence, prompt included in the time, with the same threads:
one unless told otherwise, as `dsv4 generate` takes for a model of this size (its operations are too short to share).
dsv4 runs as it comes, with the trained-in roundings that transformers leaves out; for the comparison of tokens it runs
once more without them.
The last line is one JSON document. Needs transformers (requirements/dev.txt).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import dsv4
from dsv4.checkpoint.load import load_model_weights
from dsv4.checkpoint.names import expected_tensors
from dsv4.checkpoint.plan import stack_name
from dsv4.quant.weights import Weight
from dsv4.testing.checkpoints import official_keys

PROMPT = 'def read(self, path):\n    """Return the text of the file at path."""\n    with open(path) as file:\n'


def write_bf16(model: str, folder: Path) -> None:
    """The trunk of a checkpoint with every linear in BF16, one tensor per expert, as DeepSeek would name it."""
    config, weights, source = load_model_weights(model)
    dense: dict[str, torch.Tensor] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, spec in expected_tensors(config).items():
        key = stack_name(name)
        stored = weights[key]
        if not isinstance(stored, Weight):
            tensors[spec.weight_name] = stored
            continue
        if key not in dense:
            dense[key] = stored.dequantize(torch.bfloat16)
        expert = int(name.split(".")[-2]) if spec.role == "expert" else None
        tensors[spec.weight_name] = dense[key] if expert is None else dense[key][expert].clone()
    keys = official_keys(config) | {"num_nextn_predict_layers": 0, "expert_dtype": "bf16", "quantization_config": None}
    keys["compress_ratios"] = [layer.ratio for layer in config.layers]
    (folder / "config.json").write_text(json.dumps(keys))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if source is not None and (source / "tokenizer.json").is_file():
        (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())


class Ours:
    """dsv4.LLM.generate."""

    name = "dsv4"

    def __init__(self, folder: Path, dtype: str, **options: bool):
        self.llm = dsv4.LLM(dsv4.load(folder, dtype=dtype, **options), max_num_seqs=1)

    def __call__(self, ids: list[int], tokens: int) -> list[int]:
        params = dsv4.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        return self.llm.generate(ids, params)[0].outputs[0].token_ids


class Theirs:
    """transformers' generate."""

    name = "transformers"

    def __init__(self, folder: Path, dtype: str):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.model.generation_config.eos_token_id = None

    def __call__(self, ids: list[int], tokens: int) -> list[int]:
        prompt = torch.tensor([ids])
        with torch.inference_mode():
            out = self.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False, use_cache=True
            )
        return out[0, len(ids) :].tolist()


def compare(model: str, tokens: int, rounds: int, dtype: str) -> dict[str, Any]:
    """Medians of both, their ratio, and for how many tokens the two agree."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_bf16(model, folder)
        ours, theirs = Ours(folder, dtype), Theirs(folder, dtype)
        exact = Ours(folder, dtype, kv_quant=False, index_quant=False)
        tokenizer = ours.llm.tokenizer
        ids = list(range(2, 34)) if tokenizer is None else tokenizer.encode(PROMPT, add_bos=True)
        speeds: dict[str, list[float]] = {ours.name: [], theirs.name: []}
        for number in range(rounds + 1):  # the first warms up
            for runner in (ours, theirs):
                start = time.perf_counter()
                count = len(runner(ids, tokens))
                speed = count / (time.perf_counter() - start)
                if number:
                    speeds[runner.name].append(speed)
                    print(f"round {number}: {runner.name:12s} {speed:8.2f} tok/s", flush=True)
        pairs = zip(exact(ids, tokens), theirs(ids, tokens), strict=True)
        agreeing = next((i for i, (a, b) in enumerate(pairs) if a != b), tokens)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        "model": model,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "prompt_tokens": len(ids),
        "new_tokens": tokens,
        "rounds": rounds,
        "tokens_per_second": medians,
        "ratio": medians[ours.name] / medians[theirs.name],
        "equal_greedy_tokens": agreeing,
        "raw": speeds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="nano")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = compare(arguments.model, arguments.tokens, arguments.rounds, arguments.dtype)
    for name, speed in result["tokens_per_second"].items():
        print(f"{name:12s} {speed:8.2f} tok/s (median of {result['rounds']})")
    equal = f"{result['equal_greedy_tokens']} of {arguments.tokens}"
    print(f"ratio        {result['ratio']:8.2f}; greedy tokens equal from the first on: {equal}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
