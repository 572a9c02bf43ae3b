"""One decode step of transformers' deepseek_v4 at the sizes of random:flash (or random:pro), to set beside dsv4 bench.

    python tools/bench_transformers.py [random:flash] [--layers 4] [--context 4096] [--repeats 20]
    python tools/bench_transformers.py --batch 1,2,4,8,16,32,64 --experts grouped_mm --mode graph --repeats 5

The first N layers in BF16, random weights made on the device, a prompt of random tokens read in chunks, then sequences
decode that share this prompt and differ from the next token on. Every way transformers has to run experts is tried, or
those of --experts, eager and as a CUDA graph of four steps (so that one of them completes a CSA entry); what fails is
reported with its reason and the rest goes on. Positions and masks are made beforehand, which is kind to transformers: a
graph could not hold its own. Layers that do not fit are left out. The last line is one JSON document. Needs
transformers (requirements/dev.txt); --device cpu is for tests.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DynamicCache

from dsv4.bench.timing import CudaTimer
from dsv4.checkpoint.names import expected_tensors
from dsv4.checkpoint.synthetic import shortened
from dsv4.config import ModelConfig

KINDS = {"window": "sliding_attention", "csa": "compressed_sparse_attention", "hca": "heavily_compressed_attention"}
SAME = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads head_dim q_lora_rank o_groups o_lora_rank "
    "sliding_window moe_intermediate_size n_routed_experts num_experts_per_tok routed_scaling_factor swiglu_limit "
    "index_n_heads index_head_dim index_topk hc_mult hc_sinkhorn_iters hc_eps rms_norm_eps max_position_embeddings "
    "rope_theta compress_rope_theta"
)
GRAPH_STEPS = 4
MOST_STEPS = 512  # of one cache
PREFILL_CHUNK = 512
ROOM = 0.85  # of the free memory, for weights; the rest is for the prompt and copies


def config_of(config: ModelConfig) -> DeepseekV4Config:
    """Our configuration in transformers' words."""
    ratios = {KINDS[spec.kind]: spec.ratio for spec in config.layers if spec.ratio}
    yarn = config.rope_scaling
    rope = None if yarn is None else {"rope_type": "yarn", **vars(yarn)}
    return DeepseekV4Config(
        **{key: getattr(config, key) for key in SAME.split()},
        partial_rotary_factor=config.qk_rope_head_dim / config.head_dim,
        layer_types=[KINDS[spec.kind] for spec in config.layers],
        mlp_layer_types=["hash_moe" if spec.hash else "moe" for spec in config.layers],
        compress_rates={KINDS["csa"]: 4, KINDS["hca"]: 128} | ratios,
        rope_parameters=rope,
        num_nextn_predict_layers=0,
        attn_implementation="eager",
    )


def weight_bytes(config: ModelConfig, active: bool) -> int:
    """BF16 bytes of the trunk's linears: all, or what one token reads of them."""
    total = 0.0
    for spec in expected_tensors(config).values():
        if spec.role == "expert" and active:
            total += 2 * spec.numel * config.num_experts_per_tok / config.n_routed_experts
        elif spec.role != "param" or (spec.component == "embedding" and not active):
            total += 2 * spec.numel
    return round(total)


def fitting(config: ModelConfig, device: str) -> ModelConfig:
    """The most of the layers wanted whose BF16 weights fit on the device."""
    room = torch.cuda.mem_get_info()[0] * ROOM if device == "cuda" else float("inf")
    for layers in range(config.num_hidden_layers, 1, -1):
        short = shortened(config, layers)
        if weight_bytes(short, active=False) <= room:
            return short
    return shortened(config, 1)


def build(config: ModelConfig, device: str) -> DeepseekV4ForCausalLM:
    """A BF16 model with seeded random weights, made on the device: outputs of linears have deviation 1."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = DeepseekV4ForCausalLM(config_of(config)).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    # What from_pretrained keeps in float32, but for norms: their float32 results would meet BF16 linears.
    wide = {name for name in model._keep_in_fp32_modules_strict or () if "norm" not in name}
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("tid2eid"):
                for rows in tensor.split(8192):
                    scores = torch.rand(len(rows), config.n_routed_experts, device=device)
                    rows.copy_(scores.topk(rows.shape[1]).indices)
            elif "inv_freq" not in name and tensor.is_floating_point():
                draw_(name, tensor)
                if wide.intersection(name.split(".")):
                    tensor.data = tensor.data.float()
    return model


def draw_(name: str, tensor: Tensor) -> None:
    if "norm" in name or name.endswith("scale"):
        tensor.fill_(1)
    elif tensor.dim() < 2 or "position_bias" in name:
        tensor.normal_(0, 0.5)
    else:
        tensor.normal_(0, 1 if "embed" in name else tensor.shape[-1] ** -0.5)


def implementations(model: DeepseekV4ForCausalLM) -> list[str]:
    """The ways to run experts that need nothing but torch."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        known = set(ALL_EXPERTS_FUNCTIONS.keys())
    except ImportError:
        known = set()
    return ["eager", *sorted(known & {"grouped_mm", "batched_mm"})]


def choose(model: DeepseekV4ForCausalLM, how: str) -> None:
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(how)
    else:
        model.config._experts_implementation = how


def read(model: DeepseekV4ForCausalLM, context: int, device: str) -> DynamicCache:
    """A cache in which `context` random tokens were read."""
    cache = DynamicCache(config=model.config)
    ids = torch.randint(0, model.config.vocab_size, (1, context), device=device)
    for chunk in ids.split(PREFILL_CHUNK, dim=1):
        model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def widened(cache: DynamicCache, batch: int) -> DynamicCache:
    """A copy for `batch` sequences with the same past; transformers itself forgets the compressors' states."""
    own = copy.deepcopy(cache)
    own.batch_repeat_interleave(batch)
    for layer in own.layers:
        for states in [states for states in vars(layer).values() if isinstance(states, dict)]:
            for name, state in states.items():
                states[name] = state.repeat_interleave(batch, dim=0) if isinstance(state, Tensor) else state
    return own


def stepper(
    model: DeepseekV4ForCausalLM, cache: DynamicCache, context: int, device: str, batch: int = 1
) -> Callable[[], Tensor]:
    """A function that decodes one token more of every sequence, on a cache of its own."""
    own = widened(cache, batch)
    token = (torch.arange(batch, device=device) * 911 + 7).remainder(model.config.vocab_size).unsqueeze(1)
    positions = list(torch.arange(context, context + MOST_STEPS, device=device).view(-1, 1, 1).expand(-1, batch, 1))
    window, dtype = model.config.sliding_window, torch.bfloat16  # nothing in the window is hidden from a single token
    masks = [
        torch.zeros(batch, 1, 1, min(window, context + i + 1), dtype=dtype, device=device)
        for i in range(min(MOST_STEPS, max(window - context, 1)))
    ]

    def step() -> Tensor:
        mask = masks.pop(0) if len(masks) > 1 else masks[0]
        position = positions.pop(0)
        how = {"attention_mask": mask, "position_ids": position, "past_key_values": own, "use_cache": True}
        return model(input_ids=token, **how).logits

    return step


def eager_us(step: Callable[[], Tensor], repeats: int, device: str) -> float:
    """Median microseconds of one step, launched as transformers launches it."""
    if device == "cuda":
        return statistics.median(CudaTimer().times(step, repeats=repeats, warmup=5))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def graph_us(step: Callable[[], Tensor], repeats: int) -> float:
    """Median microseconds of one step inside a CUDA graph of GRAPH_STEPS steps."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(GRAPH_STEPS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_STEPS):
            logits = step()
    times = CudaTimer().times(graph.replay, repeats=repeats, warmup=3)
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the captured step gives logits that are not finite")
    return statistics.median(times) / GRAPH_STEPS


@torch.inference_mode()
def bench(
    config: ModelConfig,
    context: int,
    repeats: int,
    device: str,
    batches: Sequence[int] = (1,),
    experts: Sequence[str] = (),
    modes: Sequence[str] = ("eager", "graph"),
) -> dict[str, Any]:
    """Every implementation (of `experts`, if any), eager and captured; `best`: the fastest that ran at each batch."""
    config = fitting(config, device)
    model = build(config, device)
    layers, results = config.num_hidden_layers, []
    cache = None
    for how in ("grouped_mm", "eager"):  # to read the prompt: batched_mm would copy the weights of every token
        try:
            choose(model, how)
            cache = read(model, context, device)
            break
        except Exception as failure:
            results.append({"experts": how, "mode": "prompt", "error": reason(failure)})
    runs = itertools.product(batches, experts or implementations(model), modes if device == "cuda" else ("eager",))
    for batch, how, mode in runs if cache is not None else ():
        row: dict[str, Any] = {"batch": batch, "experts": how, "mode": mode}
        try:
            choose(model, how)
            step = stepper(model, cache, context, device, batch)
            us = eager_us(step, repeats, device) if mode == "eager" else graph_us(step, repeats)
            row |= {"us_per_step": round(us, 2), "us_per_layer": round(us / layers, 2)}
        except Exception as failure:
            row["error"] = reason(failure)
            if device == "cuda":
                torch.cuda.synchronize()
        results.append(row)
        print(json.dumps(row), flush=True)
    ran = [row for row in results if "us_per_step" in row]
    best = [min((row for row in ran if row["batch"] == batch), key=fastest, default=None) for batch in batches]
    document: dict[str, Any] = {
        "tool": "bench_transformers",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else device,
        "layers": layers,
        "context": context,
        "weights": "bf16",
        "linear_bytes_per_token": weight_bytes(config, active=True),
        "results": results,
        "best": [row for row in best if row is not None],
    }
    if device == "cuda":
        del model, cache
        torch.cuda.empty_cache()
        document["copy_gb_s"] = round(CudaTimer().copy_gb_s(), 1)
    return document


def fastest(row: dict[str, Any]) -> float:
    return row["us_per_step"]


def reason(failure: Exception) -> str:
    first = str(failure).strip().splitlines()[:1]
    return f"{type(failure).__name__}: {first[0] if first else ''}"[:300]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="random:flash")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--batch", default="1", help="numbers of sequences, with commas")
    parser.add_argument("--experts", help="ways to run experts, with commas; all that need nothing but torch if absent")
    parser.add_argument("--mode", default="eager,graph", help="eager, graph or both")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    given = parser.parse_args()
    if given.device == "cuda":
        CudaTimer()  # one clear error where there is no GPU
    config = shortened(ModelConfig.from_name(given.model), given.layers)
    batches, experts = [int(batch) for batch in given.batch.split(",")], (given.experts or "").split(",")
    how = (batches, [name for name in experts if name], given.mode.split(","))
    print(json.dumps({"model": given.model, **bench(config, given.context, given.repeats, given.device, *how)}))


if __name__ == "__main__":
    main()
