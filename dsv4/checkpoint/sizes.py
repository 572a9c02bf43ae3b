"""Parameters and bytes counted from a config alone: what a checkpoint holds, and what one decoded token must read.

Parameters are logical weights: FP4 counts one per nibble, scales and the hash table `tid2eid` count nothing. Bytes
include the block scales of a format and leave out NVFP4's globals (4 bytes a tensor). Schemes:

| scheme                       | linears                                                                 |
|------------------------------|-------------------------------------------------------------------------|
| native                       | as DeepSeek stores them: FP4 experts, FP8, some BF16                    |
| nvfp4                        | weight policy `nvfp4` of this engine: router and `weights_proj` as stored |
| all_linear_nvfp4             | every linear NVFP4 (0.5625 bytes a weight)                              |
| all_linear_nvfp4_bf16_head   | the same, with the vocabulary projection left in BF16                   |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

from dsv4.checkpoint.names import TensorSpec, expected_tensors
from dsv4.config import ModelConfig

# Rows of the parameter table, in this order. `hash_table` has bytes but no parameters; `draft` is all of `mtp.*`.
COMPONENTS = ("attention", "indexer", "compressors", "experts", "shared_experts", "router", "mhc", "norms",
              "embedding", "lm_head", "hash_table", "draft")  # fmt: skip

Format = str  # "nvfp4", "fp4" (MXFP4), "fp8", "bf16", "f32", "i64"


def _all_linear(spec: TensorSpec) -> Format:
    return spec.stored if spec.role == "param" else "nvfp4"


SCHEMES: dict[str, Callable[[TensorSpec], Format]] = {
    "native": lambda spec: spec.stored,
    "nvfp4": lambda spec: "nvfp4" if spec.nvfp4 else spec.stored,
    "all_linear_nvfp4": _all_linear,
    "all_linear_nvfp4_bf16_head": lambda spec: "bf16" if spec.name == "head" else _all_linear(spec),
}


def format_bytes(shape: tuple[int, ...], form: Format) -> int:
    """Stored bytes of one tensor of logical `shape` ([N, K] for the quantised formats), block scales included."""
    numel = prod(shape)
    rows, inputs = shape[0], shape[-1]
    if form == "nvfp4":
        return rows * -(-inputs // 2) + rows * -(-inputs // 16)
    if form == "fp4":
        return rows * -(-inputs // 2) + rows * -(-inputs // 32)
    if form == "fp8":
        return numel + -(-rows // 128) * -(-inputs // 128)
    return numel * {"bf16": 2, "f32": 4, "i64": 8}[form]


def component_of(spec: TensorSpec) -> str:
    """The row of COMPONENTS that `spec` belongs to."""
    return "draft" if spec.block.startswith("mtp.") else spec.component


@dataclass(frozen=True)
class Read:
    """What one decoded token reads of the weights at batch 1, in bytes (or, for `Sizes.active_linears`, in weights).

    linears: the matrix products by component, scales included. mhc: the FP32 hyper-connection tensors. other: ape,
    norms, sinks, biases, one row of each table.
    """

    linears: dict[str, int]
    mhc: int
    other: int

    @property
    def floor(self) -> int:
        """Linears and mHC: what bounds the step. The rest is a thousandth of it and mostly stays in cache."""
        return sum(self.linears.values()) + self.mhc

    @property
    def total(self) -> int:
        return self.floor + self.other


@dataclass(frozen=True)
class Sizes:
    """Everything counted from one config.

    parameters: by component. active: parameters one token uses, with K of E experts, the head, and one row of the
    embedding table. active_linears: the matrix products among them, by component. draft_step_linears: linear
    parameters one pass over the draft stages uses, without the shared head. resident, read: bytes by scheme.
    """

    parameters: dict[str, int]
    active: int
    active_linears: dict[str, int]
    draft_step_linears: int
    resident: dict[str, dict[str, int]]
    read: dict[str, Read]

    @property
    def draft(self) -> int:
        return self.parameters["draft"]

    @property
    def trunk(self) -> int:
        return sum(self.parameters.values()) - self.draft


def count(config: ModelConfig) -> Sizes:
    """Count parameters, and bytes under every scheme."""
    specs = list(expected_tensors(config, mtp=True).values())
    # The experts of a block are alike: the first stands for all, or a large model would take seconds to count.
    specs = [spec for spec in specs if spec.role != "expert" or ".experts.0." in spec.name]
    copies = [config.n_routed_experts if spec.role == "expert" else 1 for spec in specs]
    weights = [
        (spec, spec.numel * number)
        for spec, number in zip(specs, copies, strict=True)
        if spec.component != "hash_table"
    ]
    parameters = _by_component(weights)
    used = sum_read(weights, config)
    experts = config.num_experts_per_tok * 3 * config.moe_intermediate_size * config.hidden_size
    draft_step = sum(spec.numel for spec in specs if component_of(spec) == "draft" and spec.role == "linear")
    draft_step += len(config.mtp_layers) * experts
    sized = {
        scheme: [
            (spec, format_bytes(spec.shape, form(spec)) * number) for spec, number in zip(specs, copies, strict=True)
        ]
        for scheme, form in SCHEMES.items()
    }
    return Sizes(
        parameters,
        used.total,
        used.linears,
        draft_step,
        {scheme: _by_component(stored) for scheme, stored in sized.items()},
        {scheme: sum_read(stored, config) for scheme, stored in sized.items()},
    )


def _by_component(amounts: Iterable[tuple[TensorSpec, int]]) -> dict[str, int]:
    sums = dict.fromkeys(COMPONENTS, 0)
    for spec, amount in amounts:
        sums[component_of(spec)] += amount
    return sums


def sum_read(stored: Iterable[tuple[TensorSpec, int]], config: ModelConfig) -> Read:
    """The Read of tensors given with their stored bytes (from a scheme, or from the headers of a checkpoint)."""
    linears: dict[str, int] = {}
    mhc = other = 0
    for spec, nbytes in stored:
        if spec.block.startswith("mtp."):
            continue
        if spec.role != "param":
            linears[spec.component] = linears.get(spec.component, 0) + nbytes
        elif spec.component == "mhc":
            mhc += nbytes
        else:  # of the two tables, one row
            other += nbytes // config.vocab_size if spec.component in ("embedding", "hash_table") else nbytes
    # Scaled after the sum: the experts of a layer are alike, so a token reads K/E of them, and that divides exactly.
    if "experts" in linears:
        linears["experts"] = linears["experts"] * config.num_experts_per_tok // config.n_routed_experts
    return Read(linears, mhc, other)


# ------------------------------------------------------------------------------------------------------- KV cache


@dataclass(frozen=True)
class KVSizes:
    """Bytes of the KV cache of one sequence in the production layout (FP8 entries with a BF16 rotary tail).

    entry: one window or compressed entry. index_key: one FP4 indexer key; index_key_fp8: its FP8 form.
    per_token: what each further token costs, on average. windows, states: fixed per sequence; the states are the
    compressors' running windows in FP32.
    """

    entry: int
    index_key: int
    index_key_fp8: int
    per_token: float
    windows: int
    states: int


def kv_sizes(config: ModelConfig) -> KVSizes:
    """The KV cache unit sizes of `config`: 584 and 68 bytes for the released models."""
    nope, rope = config.head_dim - config.qk_rope_head_dim, config.qk_rope_head_dim
    scales = -(-nope // 64)
    entry = nope + 2 * rope + -(-scales // 8) * 8  # one E8M0 byte per 64 values, padded to 8
    width = config.index_head_dim
    index_key, index_key_fp8 = -(-width // 2) + -(-width // 32), width + 4
    per_token, states = 0.0, 0
    for layer in config.layers:
        if layer.kind == "window":
            continue
        per_token += entry / layer.ratio
        # Running windows of (value, gate) in FP32; overlapping entries keep two windows of double width.
        if layer.kind == "csa":
            per_token += index_key / layer.ratio
            states += 2 * layer.ratio * 2 * (config.head_dim + width) * 2 * 4
        else:
            states += layer.ratio * config.head_dim * 2 * 4
    windows = len(config.layers) * config.sliding_window * entry
    return KVSizes(entry, index_key, index_key_fp8, per_token, windows, states)


def kv_bytes(config: ModelConfig, tokens: int) -> dict[str, int]:
    """KV bytes of a sequence of `tokens` tokens by part, without the states: csa, index_keys, hca, windows.

    `index_keys_fp8` is the alternative to `index_keys`. `read_per_token` is what one more token must read: the
    windows, the top-k entries, every index key and every HCA entry.
    """
    unit = kv_sizes(config)
    parts = dict.fromkeys(("csa", "index_keys", "hca", "windows", "index_keys_fp8", "read_per_token"), 0)
    parts["windows"] = parts["read_per_token"] = unit.windows
    for layer in config.layers:
        entries = tokens // layer.ratio if layer.ratio else 0
        if layer.kind == "csa":
            parts["csa"] += entries * unit.entry
            parts["index_keys"] += entries * unit.index_key
            parts["index_keys_fp8"] += entries * unit.index_key_fp8
            parts["read_per_token"] += min(entries, config.index_topk) * unit.entry + entries * unit.index_key
        elif layer.kind == "hca":
            parts["hca"] += entries * unit.entry
            parts["read_per_token"] += entries * unit.entry
    return parts
