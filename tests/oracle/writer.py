"""Random checkpoints in the official format: FP8 attention, FP4 experts, E8M0 scales, sharded with an index.

The statistics are chosen so that every term of the model shows in the logits (sinks, position biases, gate bias,
stream mixing), and so that router and index scores are well apart.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .files import Stored, bf16, f32, write_shards
from .formats import ceil_log2, encode_e2m1, encode_e4m3, pack_nibbles


def official_config(ratios: list[int], **changes: Any) -> dict[str, Any]:
    """An official `config.json` for a small model with these compress ratios (trunk only; one MTP block is added)."""
    config: dict[str, Any] = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "compress_ratios": [*ratios, 0],
        "compress_rope_theta": 160000,
        "eos_token_id": 1,
        "expert_dtype": "fp4",
        "hc_eps": 1e-06,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "head_dim": 192,
        "hidden_act": "silu",
        "hidden_size": 256,
        "index_head_dim": 128,
        "index_n_heads": 16,
        "index_topk": 8,
        "initializer_range": 0.02,
        "max_position_embeddings": 4096,
        "model_type": "deepseek_v4",
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hash_layers": 1,
        "num_hidden_layers": len(ratios),
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 1,
        "o_groups": 2,
        "o_lora_rank": 64,
        "q_lora_rank": 128,
        "qk_rope_head_dim": 64,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 16,
            "original_max_position_embeddings": 256,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": 128,
        "swiglu_limit": 10.0,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.1",
        "use_cache": True,
        "vocab_size": 512,
    }
    unknown = changes.keys() - config.keys()
    if unknown:
        raise KeyError(f"not official config keys: {sorted(unknown)}")
    return config | changes


def fp8_pair(weight: NDArray[np.float64]) -> tuple[Stored, Stored]:
    """[N, K] -> E4M3 data and one E8M0 scale per 128x128 block, 2^ceil(log2(amax / 448))."""
    rows, columns = weight.shape
    padded = np.zeros((-(-rows // 128) * 128, -(-columns // 128) * 128))
    padded[:rows, :columns] = weight
    amax = np.abs(padded.reshape(len(padded) // 128, 128, -1, 128)).max((1, 3))
    exponent = ceil_log2(np.maximum(amax, 1e-30) / 448)
    scale = np.repeat(np.repeat(np.ldexp(1.0, exponent), 128, 0), 128, 1)[:rows, :columns]
    return Stored("F8_E4M3", encode_e4m3(weight / scale)), Stored("F8_E8M0", (exponent + 127).astype("<u1"))


def fp4_pair(weight: NDArray[np.float64]) -> tuple[Stored, Stored]:
    """[N, K] -> packed E2M1 codes and one E8M0 scale per row and 32 inputs, 2^ceil(log2(amax / 6))."""
    amax = np.abs(weight.reshape(len(weight), -1, 32)).max(-1)
    exponent = ceil_log2(np.maximum(amax, 1e-30) / 6)
    codes = encode_e2m1(weight / np.repeat(np.ldexp(1.0, exponent), 32, -1))
    return Stored("I8", pack_nibbles(codes)), Stored("F8_E8M0", (exponent + 127).astype("<u1"))


class Author:
    """Draws the tensors of one checkpoint, all from one seed. `fmt` is `official`, `bf16` or `f32`."""

    def __init__(self, config: dict[str, Any], seed: int, fmt: str) -> None:
        self.c, self.fmt = config, fmt
        self.rng = np.random.default_rng(seed)
        self.out: dict[str, Stored] = {}

    def normal(self, *shape: int, std: float = 1.0) -> NDArray[np.float64]:
        """Gaussian values."""
        return self.rng.standard_normal(shape) * std

    def plain(self, name: str, values: NDArray[np.float64]) -> None:
        """A tensor the official files hold in BF16 (float32 in an f32 checkpoint)."""
        self.out[name] = f32(values) if self.fmt == "f32" else bf16(values)

    def linear(self, module: str, rows: int, columns: int, pack: Any = fp8_pair, gain: float = 1.0) -> None:
        """A linear whose outputs have the size of its inputs, times `gain`."""
        weight = self.normal(rows, columns, std=gain * columns**-0.5)
        blocks = self.rng.choice([0.5, 1.0, 1.5], (-(-rows // 128), -(-columns // 128)))  # so that scales differ
        weight *= np.repeat(np.repeat(blocks, 128, 0), 128, 1)[:rows, :columns]
        if self.fmt == "official":
            self.out[f"{module}.weight"], self.out[f"{module}.scale"] = pack(weight)
        else:
            self.plain(f"{module}.weight", weight)

    def mixer(self, name: str, rows: int, scales: int) -> None:
        """The float32 triple `{name}_fn/_base/_scale` of one mHC site."""
        width = self.c["hc_mult"] * self.c["hidden_size"]
        self.out[f"{name}_fn"] = f32(self.normal(rows, width, std=width**-0.5))
        self.out[f"{name}_base"] = f32(self.normal(rows, std=0.7))
        self.out[f"{name}_scale"] = f32(self.rng.uniform(0.5, 1.5, scales))

    def norm(self, name: str, width: int) -> None:
        """A norm weight near 1."""
        self.plain(f"{name}.weight", 1 + self.normal(width, std=0.2))

    def compressor(self, p: str, ratio: int, width: int) -> None:
        """wkv, wgate, ape, norm; twice as wide when windows overlap."""
        wide, hidden = width * (2 if ratio == 4 else 1), self.c["hidden_size"]
        for module in ("wkv", "wgate"):
            self.plain(f"{p}.{module}.weight", self.normal(wide, hidden, std=hidden**-0.5))
        self.out[f"{p}.ape"] = f32(self.normal(ratio, wide, std=0.7))
        self.norm(f"{p}.norm", width)

    def attention(self, p: str, ratio: int) -> None:
        """All `attn.*` tensors of one block."""
        c = self.c
        hidden, rank = c["hidden_size"], c["q_lora_rank"]
        heads, head_dim = c["num_attention_heads"], c["head_dim"]
        self.linear(f"{p}.wq_a", rank, hidden)
        self.norm(f"{p}.q_norm", rank)
        self.linear(f"{p}.wq_b", heads * head_dim, rank)
        self.linear(f"{p}.wkv", head_dim, hidden)
        self.plain(f"{p}.kv_norm.weight", 1.5 + self.normal(head_dim, std=0.2))  # attention far from uniform
        self.linear(f"{p}.wo_a", c["o_groups"] * c["o_lora_rank"], heads * head_dim // c["o_groups"])
        self.linear(f"{p}.wo_b", hidden, c["o_groups"] * c["o_lora_rank"], gain=1.5)
        self.out[f"{p}.attn_sink"] = f32(self.normal(heads) + 1)
        if ratio:
            self.compressor(f"{p}.compressor", ratio, head_dim)
        if ratio == 4:
            heads, width = c["index_n_heads"], c["index_head_dim"]
            self.linear(f"{p}.indexer.wq_b", heads * width, rank)
            self.plain(f"{p}.indexer.weights_proj.weight", self.normal(heads, hidden, std=hidden**-0.5))
            self.compressor(f"{p}.indexer.compressor", ratio, width)

    def block(self, p: str, ratio: int, hashed: bool) -> None:
        """One transformer block."""
        c, hidden, width = self.c, self.c["hidden_size"], self.c["moe_intermediate_size"]
        self.attention(f"{p}.attn", ratio)
        self.norm(f"{p}.attn_norm", hidden)
        self.norm(f"{p}.ffn_norm", hidden)
        experts, k = c["n_routed_experts"], c["num_experts_per_tok"]
        self.plain(f"{p}.ffn.gate.weight", self.normal(experts, hidden, std=2 * hidden**-0.5))
        if hashed:
            order = np.argsort(self.rng.random((c["vocab_size"], experts)), axis=1)
            self.out[f"{p}.ffn.gate.tid2eid"] = Stored("I64", order[:, :k].astype("<i8"))
        else:
            self.out[f"{p}.ffn.gate.bias"] = f32(self.normal(experts, std=0.5))
        for name in [*(f"experts.{e}" for e in range(experts)), "shared_experts"]:
            pack = fp8_pair if name == "shared_experts" else fp4_pair
            # gain 5: some gate and up values pass swiglu_limit 10, so the clamp is seen
            self.linear(f"{p}.ffn.{name}.w1", width, hidden, pack, gain=5)
            self.linear(f"{p}.ffn.{name}.w3", width, hidden, pack, gain=5)
            self.linear(f"{p}.ffn.{name}.w2", hidden, width, pack, gain=0.1)
        m = c["hc_mult"]
        self.mixer(f"{p}.hc_attn", (2 + m) * m, 3)
        self.mixer(f"{p}.hc_ffn", (2 + m) * m, 3)

    def take(self) -> dict[str, Stored]:
        """What was drawn since the last call: one shard."""
        shard, self.out = self.out, {}
        return shard


def write_checkpoint(folder: Path, config: dict[str, Any], *, seed: int = 0, fmt: str = "official") -> Path:
    """Write a whole random checkpoint folder (config, index, one shard a layer) and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    if fmt != "official":
        config = {k: v for k, v in config.items() if k not in ("quantization_config", "expert_dtype")}
        config["torch_dtype"] = "float32" if fmt == "f32" else "bfloat16"
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    a, vocab, hidden, m = Author(config, seed, fmt), config["vocab_size"], config["hidden_size"], config["hc_mult"]
    a.plain("embed.weight", a.normal(vocab, hidden))
    shards = [a.take()]
    for layer in range(config["num_hidden_layers"]):
        a.block(f"layers.{layer}", config["compress_ratios"][layer], layer < config["num_hash_layers"])
        shards.append(a.take())
    a.norm("norm", hidden)
    a.plain("head.weight", a.normal(vocab, hidden, std=hidden**-0.5))
    a.mixer("hc_head", m, 1)
    for stage in range(config["num_nextn_predict_layers"]):
        p = f"mtp.{stage}"
        a.block(p, 0, False)
        for module in ("e_proj", "h_proj"):
            a.linear(f"{p}.{module}", hidden, hidden)
        for module in ("enorm", "hnorm", "norm"):
            a.norm(f"{p}.{module}", hidden)
        a.mixer(f"{p}.hc_head", m, 1)
    write_shards(folder, [*shards, a.take()])
    return folder
