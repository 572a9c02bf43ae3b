"""Random small DeepseekV4 models made by transformers, saved as it saves them: the independent library as oracle.

transformers leaves some tensors at values that hide mistakes (zero sinks, zero position biases, every token of a hash
layer on expert 0); `build` draws all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

KIND = {"W": "sliding_attention", "C": "compressed_sparse_attention", "H": "heavily_compressed_attention"}


@dataclass(frozen=True)
class Case:
    """One random model: `layers` spells the attention kinds, W window, C CSA, H HCA; `hashed` the layers that hash."""

    seed: int
    layers: str
    hashed: tuple[int, ...] = ()
    length: int = 100
    hca: int = 16
    yarn: bool = False
    sizes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What pytest shows."""
        return f"{self.layers}-{self.length}" + ("-yarn" if self.yarn else "")


def config_of(case: Case) -> DeepseekV4Config:
    """The transformers config of a case; `sizes` overrides any field, `rope_dim` sets the rotated dims."""
    sizes = dict(case.sizes)
    head_dim, rope_dim = sizes.pop("head_dim", 48), sizes.pop("rope_dim", 16)
    yarn = {"factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0}
    fields: dict[str, Any] = {
        "vocab_size": 199,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "num_attention_heads": 4,
        "head_dim": head_dim,
        "qk_rope_head_dim": rope_dim,
        "q_lora_rank": 40,
        "num_experts_per_tok": 2,
        "n_routed_experts": 6,
        "max_position_embeddings": 512,
        "sliding_window": 24,
        "o_groups": 2,
        "o_lora_rank": 24,
        "index_n_heads": 16,  # with few heads every relu may be zero, and a tie at zero is broken as one likes
        "index_head_dim": 32,
        "index_topk": 5,
        "hc_mult": 4,
        "num_nextn_predict_layers": 0,
        "attn_implementation": "eager",
    }
    unknown = (
        sizes.keys()
        - fields.keys()
        - {"routed_scaling_factor", "swiglu_limit", "hc_sinkhorn_iters", "hc_eps", "rms_norm_eps"}
    )
    if unknown:
        raise KeyError(f"unknown sizes {sorted(unknown)}")
    return DeepseekV4Config(
        **fields | sizes,
        num_hidden_layers=len(case.layers),
        layer_types=[KIND[letter] for letter in case.layers],
        mlp_layer_types=["hash_moe" if i in case.hashed else "moe" for i in range(len(case.layers))],
        compress_rates={KIND["C"]: 4, KIND["H"]: case.hca},
        rope_parameters={"rope_type": "yarn", **yarn} if case.yarn else None,
    )


def draw(name: str, shape: torch.Size, config: DeepseekV4Config) -> torch.Tensor:
    """Values for one parameter or buffer, by its name: every term must be large enough to be seen in the logits."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "tid2eid":
        return torch.rand(shape[0], config.n_routed_experts).argsort(1)[:, : shape[1]]
    noise = torch.randn(shape)
    if "norm" in name:
        return 1 + 0.2 * noise
    if leaf in ("scale", "hc_scale"):
        return 0.5 + torch.rand(shape)
    if leaf in ("sinks", "base", "hc_base", "position_bias", "e_score_correction_bias"):
        return 0.7 * noise
    if "embed_tokens" in name:
        return noise
    if leaf == "gate_up_proj" or "shared_experts.gate" in name or "shared_experts.up" in name:
        return 5 * noise * shape[-1] ** -0.5  # some values pass swiglu_limit
    if leaf == "down_proj" or "shared_experts.down" in name:
        return 0.1 * noise * shape[-1] ** -0.5
    if "mlp.gate.weight" in name:
        return 2 * noise * shape[-1] ** -0.5
    return noise * shape[-1] ** -0.5


def build(case: Case, folder: Path) -> DeepseekV4ForCausalLM:
    """A float32 model drawn from the case's seed and saved to `folder`."""
    torch.manual_seed(case.seed)
    model = DeepseekV4ForCausalLM(config_of(case)).float().eval()
    persistent = model.state_dict()
    with torch.no_grad():
        for name in sorted(persistent):
            tensor = persistent[name]
            tensor.copy_(draw(name, tensor.shape, model.config).to(tensor.dtype))
    model.generation_config.eos_token_id = None  # greedy comparisons want a fixed length
    model.save_pretrained(folder)
    return model


def prompt(case: Case) -> torch.Tensor:
    """Random token ids of the case's length."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    return torch.randint(0, 199, (case.length,), generator=generator)


# Each layer kind first, hash layers anywhere, odd lengths from 1 to 300, top-k below the number of entries,
# HCA windows of 16 and 128, plain and YaRN rotation, head sizes that are no multiple of 64.
CASES = (
    Case(0, "WCHC", hashed=(0,), length=97),
    Case(1, "CWH", hashed=(1,), length=61, yarn=True, sizes={"hc_eps": 0.02, "rms_norm_eps": 0.03}),
    Case(2, "HCWC", hashed=(2, 3), length=131, hca=128, yarn=True),
    Case(
        3,
        "CC",
        length=300,
        hca=128,
        sizes={"index_topk": 8, "sliding_window": 128, "head_dim": 80, "rope_dim": 64, "index_head_dim": 64},
    ),
    Case(4, "HWC", hashed=(0, 1, 2), length=257, hca=128, sizes={"sliding_window": 16, "num_attention_heads": 6}),
    Case(5, "W", length=1, sizes={"o_groups": 1, "num_experts_per_tok": 1}),
    Case(6, "CH", hashed=(1,), length=7, yarn=True, sizes={"head_dim": 33, "rope_dim": 8}),
    Case(7, "CHCHC", length=199, yarn=True, sizes={"index_topk": 3, "n_routed_experts": 9, "num_experts_per_tok": 3}),
    Case(
        8, "WW", hashed=(1,), length=3, sizes={"hidden_size": 48, "hc_sinkhorn_iters": 3, "routed_scaling_factor": 2.5}
    ),
    Case(
        9, "HC", length=128, hca=128, yarn=True, sizes={"index_n_heads": 32, "index_head_dim": 16, "swiglu_limit": 3.0}
    ),
)
