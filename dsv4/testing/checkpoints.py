"""Random checkpoints on disk, in every layout dsv4 reads: for tests, and for trying a loader without a download."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from dsv4.checkpoint.compressed_tensors import COMPRESSED_TENSORS
from dsv4.checkpoint.modelopt_config import quantization_config
from dsv4.checkpoint.names import ROWS, TensorSpec, expected_tensors
from dsv4.checkpoint.official import FP8
from dsv4.checkpoint.random import random_tensors, store
from dsv4.checkpoint.reader import INDEX_NAME
from dsv4.config import ModelConfig
from dsv4.quant.weights import FP8Weight, NVFP4Weight

Format = Literal["official", "modelopt", "modelopt-all", "compressed-tensors", "bf16"]
FORMATS: tuple[Format, ...] = ("official", "modelopt", "modelopt-all", "compressed-tensors", "bf16")

FP8_CONFIG: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "scale_fmt": "ue8m0",
}
COMPRESSED_CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "mixed-precision",
    "ignore": ["lm_head", "re:.*embed.*", "re:.*norm.*", "re:.*gate$", "re:^mtp.*"],
    "config_groups": {
        "group_0": {"format": "float-quantized", "targets": ["re:.*self_attn\\.(q_a|q_b|kv|o_a|o_b)_proj$"]},
        "group_1": {"format": "nvfp4-pack-quantized", "targets": ["re:.*mlp\\.experts\\..*"]},
    },
}


def write_random_checkpoint(
    folder: str | Path,
    config: ModelConfig | Mapping[str, Any],
    *,
    format: Format = "official",
    seed: int = 0,
    shards: int = 1,
    mtp: bool = True,
) -> Path:
    """Writes config.json and `shards` safetensors files (with an index, if more than one) into `folder`; returns it.

    config: the keys of an official config.json, or a ModelConfig. The masters are `random_tensors(config, seed)`,
    stored as DeepSeek does ("official"), with NVFP4 experts as NVIDIA does ("modelopt"), with every large linear NVFP4
    ("modelopt-all"), as llm-compressor does ("compressed-tensors", transformers' names) or unquantised ("bf16").
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r}; expected one of {', '.join(FORMATS)}")
    data = official_keys(config) if isinstance(config, ModelConfig) else dict(config)
    parsed = ModelConfig.from_dict(data)
    specs = expected_tensors(parsed, mtp)
    tensors: dict[str, Tensor] = {}
    for key, master in random_tensors(parsed, seed, mtp).items():
        tensors |= stored_as(format, specs[key], master)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data | _quantization_keys(format, data), indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    write_shards(folder, tensors, shards)
    return folder


def write_shards(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """`tensors` dealt out to `shards` files in turn, with an index if there are several."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def stored_as(format: Format, spec: TensorSpec, master: Tensor) -> dict[str, Tensor]:
    """The tensors that hold one master in a checkpoint of this format, by their names in the file."""
    trunk_expert = spec.role == "expert" and not spec.block.startswith("mtp")
    if format == "bf16":
        return {spec.weight_name: master}
    if format == "compressed-tensors":
        return _compressed_tensors(spec, master, trunk_expert)
    large = spec.nvfp4 and not spec.block.startswith("mtp")
    return store(spec, master, nvfp4=(format == "modelopt" and trunk_expert) or (format == "modelopt-all" and large))


def _compressed_tensors(spec: TensorSpec, master: Tensor, trunk_expert: bool) -> dict[str, Tensor]:
    if spec.block.startswith("mtp"):  # llm-compressor leaves the draft alone; converters carry it along in BF16
        return {spec.weight_name: master}
    name = transformers_name(spec)
    if trunk_expert:
        weight = NVFP4Weight.quantize(master)
        weight = NVFP4Weight(weight.codes, weight.scale, weight.global_scale, torch.tensor(1 / 256))
        parts = COMPRESSED_TENSORS.encode(weight)
    elif re.search(r"\.attn\.w(q_a|q_b|kv|o_a|o_b)$", spec.name):
        parts = FP8.encode(FP8Weight.quantize(master))
        parts = {"weight": parts["weight"], "weight_scale": parts["scale"].float()}
    elif spec.role == "param":
        return {name: master}
    else:
        parts = {"weight": master}
    return {f"{name}.{suffix}": tensor for suffix, tensor in parts.items()}


def transformers_name(spec: TensorSpec) -> str:
    """The key of `spec` in the words of transformers' modules, as compressed-tensors files have it."""
    if spec.name == "head":
        return "lm_head"
    below = spec.name.removeprefix(f"{spec.block}.") if spec.block else spec.name
    pattern, prefix = re.sub(r"experts\.\d+", "experts.{e}", below), f"{spec.block}." if spec.block else ""
    expert = re.search(r"experts\.(\d+)", below)
    row = next(row for row in ROWS if row.name == pattern and (row.owner == "top") == (not spec.block))
    alias = row.aliases[0] if row.aliases else row.name
    return f"model.{prefix}{alias.replace('{e}', expert[1] if expert else '')}"


def _quantization_keys(format: Format, data: Mapping[str, Any]) -> dict[str, Any]:
    if format == "bf16":
        return {"quantization_config": None, "expert_dtype": "bf16"}
    if format == "compressed-tensors":
        return {"quantization_config": COMPRESSED_CONFIG, "expert_dtype": "fp4"}
    if format == "official":
        return {"quantization_config": FP8_CONFIG, "expert_dtype": "fp4"}
    modules = [f"layers.{layer}.ffn.experts" for layer in range(data["num_hidden_layers"])]
    keys = quantization_config(modules, all_linear=format == "modelopt-all", fp8_scale_fmt="ue8m0")
    return {"quantization_config": keys, "expert_dtype": "fp4"}


def official_keys(config: ModelConfig) -> dict[str, Any]:
    """`config` as the keys of an official config.json; ModelConfig.from_dict gives it back."""
    yarn = config.rope_scaling
    same = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads head_dim qk_rope_head_dim q_lora_rank o_groups "
        "o_lora_rank sliding_window moe_intermediate_size n_routed_experts n_shared_experts num_experts_per_tok "
        "routed_scaling_factor swiglu_limit index_n_heads index_head_dim index_topk hc_mult hc_sinkhorn_iters hc_eps "
        "rms_norm_eps max_position_embeddings rope_theta compress_rope_theta bos_token_id eos_token_id "
        "num_nextn_predict_layers torch_dtype"
    )
    data: dict[str, Any] = {key: getattr(config, key) for key in same.split()}
    data |= {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "compress_ratios": [layer.ratio for layer in config.layers + config.mtp_layers],
        "mlp_layer_types": ["hash_moe" if layer.hash else "moe" for layer in config.layers],
        "rope_scaling": None
        if yarn is None
        else {
            "type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_position_embeddings,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
        },
    }
    if config.quantization is not None:
        data["quantization_config"] = dict(config.quantization.facts)
    if config.expert_dtype is not None:
        data["expert_dtype"] = config.expert_dtype
    if config.dspark is not None:
        data |= {
            "dspark_block_size": config.dspark.block_size,
            "dspark_noise_token_id": config.dspark.noise_token_id,
            "dspark_target_layer_ids": list(config.dspark.target_layer_ids),
            "dspark_markov_rank": config.dspark.markov_rank,
        }
    return data
