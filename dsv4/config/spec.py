"""What a configuration holds once it is known to be right: frozen dataclasses, no parsing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

LayerKind = Literal["window", "csa", "hca"]


@dataclass(frozen=True)
class YarnScaling:
    """YaRN frequency interpolation (SPEC 2.1); cos and sin are never rescaled (no mscale).

    factor: how much longer the context became. original_max_position_embeddings: tokens before scaling.
    beta_fast, beta_slow: rotations over the original context between which the ramp runs.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True)
class LayerSpec:
    """One block. kind: `window` (ratio 0), `csa` (compressor with overlap, and an indexer) or `hca` (compressor only).

    ratio: tokens per compressed entry (0 for window). hash: experts come from the table `tid2eid`, not from scores.
    rope_theta, yarn: the rotary base of every vector in this layer; yarn is None in window layers.
    """

    kind: LayerKind
    ratio: int
    hash: bool
    rope_theta: float
    yarn: YarnScaling | None


@dataclass(frozen=True)
class DSparkConfig:
    """Block drafter of the 0731/0813 releases. target_layer_ids: trunk layers whose output feeds stage 0."""

    block_size: int
    noise_token_id: int
    target_layer_ids: tuple[int, ...]
    markov_rank: int


@dataclass(frozen=True)
class QuantizationConfig:
    """What `quantization_config` claims. The format of a tensor is decided by the tensor; this is only reported.

    quant_method: `fp8` (official, and ModelOpt's mixed checkpoints), `modelopt` or `compressed-tensors`.
    facts: the dict as found in the file.
    """

    quant_method: str
    facts: Mapping[str, Any] = field(hash=False)  # a mapping has no hash; without it a whole config would have none

    @property
    def label(self) -> str:
        """One word or two for people: the method, and the producer's algorithm where it names one."""
        algorithm = self.facts.get("quant_algo") or self.facts.get("format")
        return f"{self.quant_method} ({algorithm})" if algorithm else self.quant_method


@dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-V4 model. Field names are the keys of the official config.json; letters: see `dsv4.config`.

    layers: the trunk, one LayerSpec per layer. mtp_layers: the draft blocks that follow it (one MTP block, or the
    DSpark stages when `dspark` is set); the config announces them, only the checkpoint's tensors prove them.
    torch_dtype: `bfloat16` or `float32`, the dtype of unquantised tensors. expert_dtype: the file's claim, or None.
    bos_token_id, eos_token_id: None when the file says null.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    swiglu_limit: float
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    compress_rope_theta: float
    rope_scaling: YarnScaling | None
    bos_token_id: int | None
    eos_token_id: int | None
    num_nextn_predict_layers: int
    torch_dtype: str
    expert_dtype: str | None
    layers: tuple[LayerSpec, ...]
    mtp_layers: tuple[LayerSpec, ...]
    quantization: QuantizationConfig | None
    dspark: DSparkConfig | None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "config") -> ModelConfig:
        """Check `data` (a parsed config.json) and build the configuration; `where` names the source in messages.

        Raises ConfigError listing every finding: unknown or missing key, wrong type, schedule of the wrong length,
        impossible value, another architecture, remote code.
        """
        from dsv4.config.parse import parse

        return parse(data, where)

    @classmethod
    def from_path(cls, path: str | Path) -> ModelConfig:
        """Read `config.json` in the folder `path` (or the file itself). Raises ConfigError; executes nothing."""
        from dsv4.config.parse import read_json

        file = Path(path)
        if file.suffix != ".json":
            file = file / "config.json"
        return cls.from_dict(read_json(file), where=str(file))

    @classmethod
    def from_name(cls, name: str) -> ModelConfig:
        """`random:tiny`, `random:flash` or `random:pro`: a configuration that needs no file. Raises ConfigError."""
        from dsv4.config.releases import NAMED
        from dsv4.errors import ConfigError

        if name not in NAMED:
            raise ConfigError(f"{name!r} is no named configuration; expected one of {', '.join(NAMED)}")
        return cls.from_dict(NAMED[name], where=name)

    @property
    def layer_counts(self) -> dict[LayerKind, int]:
        """How many trunk layers of each kind there are."""
        kinds: tuple[LayerKind, ...] = ("window", "csa", "hca")
        return {kind: sum(layer.kind == kind for layer in self.layers) for kind in kinds}
