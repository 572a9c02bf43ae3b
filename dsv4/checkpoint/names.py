"""Every tensor of a DeepSeek-V4 checkpoint, once: its name, who carries it, its shape, what it is, how others call it.

`expected_tensors(config, mtp)` lists what a checkpoint of this config must hold; `canonical_name(name)` turns a name
found in a file (official, transformers' save_pretrained, or transformers modules as compressed-tensors writes them)
into the official one without `model.` prefix. `ROWS` is the table behind both; letters are those of `dsv4.config`.

A linear is keyed by its module path (`layers.3.attn.wq_a`); in the file it is that path plus one of `PARTS`
(`.weight`, `.scale`, `.weight_packed`, ...). Everything else is keyed by its whole name (`layers.3.attn.attn_sink`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Literal

from dsv4.config import LayerSpec, ModelConfig
from dsv4.parallel.shard import Cut, Share

Role = Literal["linear", "expert", "param"]
Stored = Literal["fp4", "fp8", "bf16", "f32", "i64"]
Split = Literal["", "rows", "columns"]

# What may follow the module path of a linear: the weight itself (plain, or packed by compressed-tensors), then scales.
# official FP4/FP8: scale; ModelOpt: weight_scale, weight_scale_2, input_scale;
# compressed-tensors: weight_scale, weight_global_scale, input_global_scale; transformers FP8: weight_scale_inv.
PARTS = ("weight", "weight_packed", "scale", "weight_scale", "weight_scale_2", "input_scale", "weight_global_scale",
         "input_global_scale", "weight_scale_inv")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table.

    name: official name below its owner (the block, or the top level); a linear without `.weight`.
    owner: `top`; or which blocks carry it: `block` (all), `compressed` (csa and hca), `csa`, `hash`, `score`; or which
    draft stages besides: `mtp` (the original block), `dspark_first`, `dspark_last`, `draft_head` (the stage that ends
    in logits: every original block, the last DSpark stage). Draft stages are window blocks with score routing.
    shape: logical shape, products of dimension letters. stored: format in DeepSeek's release.
    component: which line of the parameter table it counts in. nvfp4: policy `nvfp4` requantises it.
    aliases: the name below its owner in transformers' modules, then in files that transformers writes.
    split: what tensor parallelism divides evenly among ranks: heads (rows of wq_b, attn_sink, and by groups wo_a; their
    counterpart are columns of wo_b), the inner width of every expert (unless the experts are divided by number: see
    TensorSpec.cut), the vocabulary of the head. The rest is held by
    every rank: the embedding (a row per token is read), whatever makes the one key and value, and the indexer, for
    adding up its scores over ranks would take longer than reading all of its weights.
    """

    name: str
    owner: str
    shape: tuple[str, ...]
    role: Role
    stored: Stored
    component: str
    nvfp4: bool = False
    aliases: tuple[str, ...] = ()
    split: Split = ""


def _linear(name: str, owner: str, shape: str, stored: Stored, component: str, alias: str = "", nvfp4: bool = True,
            role: Role = "linear", split: Split = "") -> Row:  # fmt: skip
    return Row(name, owner, tuple(shape.split()), role, stored, component, nvfp4, tuple(alias.split()), split)


def _param(name: str, owner: str, shape: str, stored: Stored, component: str, alias: str = "",
           split: Split = "") -> Row:  # fmt: skip
    return Row(name, owner, tuple(shape.split()), "param", stored, component, False, tuple(alias.split()), split)


ROWS: tuple[Row, ...] = (
    # top level
    _param("embed.weight", "top", "V D", "bf16", "embedding", "embed_tokens.weight"),
    _linear("head", "top", "V D", "bf16", "lm_head", "lm_head", split="rows"),
    _param("norm.weight", "top", "D", "bf16", "norms"),
    _param("hc_head_fn", "top", "M M*D", "f32", "mhc", "hc_head.hc_fn"),
    _param("hc_head_base", "top", "M", "f32", "mhc", "hc_head.hc_base"),
    _param("hc_head_scale", "top", "1", "f32", "mhc", "hc_head.hc_scale"),
    # attention
    _linear("attn.wq_a", "block", "Q D", "fp8", "attention", "self_attn.q_a_proj"),
    _linear("attn.wq_b", "block", "H*Dh Q", "fp8", "attention", "self_attn.q_b_proj", split="rows"),
    _linear("attn.wkv", "block", "Dh D", "fp8", "attention", "self_attn.kv_proj"),
    _linear("attn.wo_a", "block", "G*O H*Dh/G", "fp8", "attention", "self_attn.o_a_proj", split="rows"),
    _linear("attn.wo_b", "block", "D G*O", "fp8", "attention", "self_attn.o_b_proj", split="columns"),
    _param("attn.attn_sink", "block", "H", "f32", "attention", "self_attn.sinks", split="rows"),
    _param("attn.q_norm.weight", "block", "Q", "bf16", "norms", "self_attn.q_a_norm.weight"),
    # transformers 5.23 writes kv_norm back as attn.norm: its rename table is not one to one.
    _param("attn.kv_norm.weight", "block", "Dh", "bf16", "norms", "self_attn.kv_norm.weight attn.norm.weight"),
    # compressor: c is 2 where entries overlap (csa), else 1
    _linear("attn.compressor.wkv", "compressed", "c*Dh D", "bf16", "compressors", "self_attn.compressor.kv_proj"),
    _linear("attn.compressor.wgate", "compressed", "c*Dh D", "bf16", "compressors", "self_attn.compressor.gate_proj"),
    _param("attn.compressor.ape", "compressed", "m c*Dh", "f32", "compressors", "self_attn.compressor.position_bias"),
    _param("attn.compressor.norm.weight", "compressed", "Dh", "bf16", "norms", "self_attn.compressor.kv_norm.weight"),
    # indexer
    _linear("attn.indexer.wq_b", "csa", "Hi*Di Q", "fp8", "indexer", "self_attn.compressor.indexer.q_b_proj"),
    _linear("attn.indexer.weights_proj", "csa", "Hi D", "bf16", "indexer",
            "self_attn.compressor.indexer.scorer.weights_proj self_attn.compressor.indexer.weights_proj",
            nvfp4=False),
    _linear("attn.indexer.compressor.wkv", "csa", "2*Di D", "bf16", "indexer",
            "self_attn.compressor.indexer.kv_proj"),
    _linear("attn.indexer.compressor.wgate", "csa", "2*Di D", "bf16", "indexer",
            "self_attn.compressor.indexer.gate_proj"),
    _param("attn.indexer.compressor.ape", "csa", "m 2*Di", "f32", "indexer",
           "self_attn.compressor.indexer.position_bias"),
    _param("attn.indexer.compressor.norm.weight", "csa", "Di", "bf16", "norms",
           "self_attn.compressor.indexer.kv_norm.weight"),
    # block norms and hyper-connections
    _param("attn_norm.weight", "block", "D", "bf16", "norms", "input_layernorm.weight"),
    _param("ffn_norm.weight", "block", "D", "bf16", "norms", "post_attention_layernorm.weight"),
    _param("hc_attn_fn", "block", "M*M+2*M M*D", "f32", "mhc", "attn_hc.fn"),
    _param("hc_attn_base", "block", "M*M+2*M", "f32", "mhc", "attn_hc.base"),
    _param("hc_attn_scale", "block", "3", "f32", "mhc", "attn_hc.scale"),
    _param("hc_ffn_fn", "block", "M*M+2*M M*D", "f32", "mhc", "ffn_hc.fn"),
    _param("hc_ffn_base", "block", "M*M+2*M", "f32", "mhc", "ffn_hc.base"),
    _param("hc_ffn_scale", "block", "3", "f32", "mhc", "ffn_hc.scale"),
    # mixture of experts; {e} is the expert
    _linear("ffn.gate", "block", "E D", "bf16", "router", "mlp.gate", nvfp4=False),
    _param("ffn.gate.bias", "score", "E", "f32", "router", "mlp.gate.e_score_correction_bias"),
    _param("ffn.gate.tid2eid", "hash", "V K", "i64", "hash_table", "mlp.gate.tid2eid"),
    _linear("ffn.experts.{e}.w1", "block", "F D", "fp4", "experts", "mlp.experts.{e}.gate_proj", role="expert",
            split="rows"),
    _linear("ffn.experts.{e}.w2", "block", "D F", "fp4", "experts", "mlp.experts.{e}.down_proj", role="expert",
            split="columns"),
    _linear("ffn.experts.{e}.w3", "block", "F D", "fp4", "experts", "mlp.experts.{e}.up_proj", role="expert",
            split="rows"),
    _linear("ffn.shared_experts.w1", "block", "F D", "fp8", "shared_experts", "mlp.shared_experts.gate_proj",
            split="rows"),
    _linear("ffn.shared_experts.w2", "block", "D F", "fp8", "shared_experts", "mlp.shared_experts.down_proj",
            split="columns"),
    _linear("ffn.shared_experts.w3", "block", "F D", "fp8", "shared_experts", "mlp.shared_experts.up_proj",
            split="rows"),
    # the original MTP block
    _linear("e_proj", "mtp", "D D", "fp8", "draft"),
    _linear("h_proj", "mtp", "D D", "fp8", "draft"),
    _param("enorm.weight", "mtp", "D", "bf16", "draft"),
    _param("hnorm.weight", "mtp", "D", "bf16", "draft"),
    # DSpark; P is the number of target layers, p the Markov rank
    _linear("main_proj", "dspark_first", "D P*D", "fp8", "draft"),
    _param("main_norm.weight", "dspark_first", "D", "bf16", "draft"),
    _param("markov_head.markov_w1.weight", "dspark_last", "V p", "bf16", "draft"),
    _linear("markov_head.markov_w2", "dspark_last", "V p", "bf16", "draft", nvfp4=False),
    _linear("confidence_head.proj", "dspark_last", "1 D+p", "bf16", "draft", nvfp4=False),
    # the head of the last draft stage; vocabulary projection and embedding are the trunk's
    _param("norm.weight", "draft_head", "D", "bf16", "draft"),
    _param("hc_head_fn", "draft_head", "M M*D", "f32", "draft", "hc_head.hc_fn"),
    _param("hc_head_base", "draft_head", "M", "f32", "draft", "hc_head.hc_base"),
    _param("hc_head_scale", "draft_head", "1", "f32", "draft", "hc_head.hc_scale"),
)  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """What one tensor must be. name: the canonical key (module path of a linear). shape: logical, (N, K) for linears.

    role: `linear`, `expert` (one routed expert's linear) or `param`. stored: format in DeepSeek's own release.
    block: `layers.3`, `mtp.0`, or empty at the top level. nvfp4: requantised under the policy `nvfp4`. split: which
    dimension ranks divide, "rows" (of a vector: its entries) or "columns"; empty for what each of them holds whole.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    stored: Stored
    component: str
    nvfp4: bool
    block: str
    split: Split = ""

    @property
    def weight_name(self) -> str:
        """The name of the tensor itself in an official file: a linear's module path gains `.weight`."""
        return self.name if self.role == "param" else self.name + ".weight"

    @property
    def numel(self) -> int:
        """Logical number of elements."""
        return prod(self.shape)

    @property
    def expert(self) -> int:
        """The number of the routed expert whose linear this is."""
        return int(self.name.split(".")[-2])

    def cut(self, share: Share) -> Cut | None:
        """What a rank holds of it; None for all. Of experts divided by number a rank holds those of share.experts."""
        return None if self.role == "expert" and share.by_expert else share.cut(self.split, self.shape)


def dimensions(config: ModelConfig, layer: LayerSpec | None = None) -> dict[str, int]:
    """Values of the letters used in ROWS; m (ratio) and c (2 where entries overlap) are those of `layer`."""
    dims = {
        "V": config.vocab_size, "D": config.hidden_size, "H": config.num_attention_heads, "Dh": config.head_dim,
        "Q": config.q_lora_rank, "G": config.o_groups, "O": config.o_lora_rank, "M": config.hc_mult,
        "E": config.n_routed_experts, "K": config.num_experts_per_tok, "F": config.moe_intermediate_size,
        "Hi": config.index_n_heads, "Di": config.index_head_dim,
    }  # fmt: skip
    if layer is not None:
        dims |= {"m": layer.ratio, "c": 2 if layer.kind == "csa" else 1}
    if config.dspark is not None:
        dims |= {"P": len(config.dspark.target_layer_ids), "p": config.dspark.markov_rank}
    return dims


def expected_tensors(config: ModelConfig, mtp: bool = False) -> dict[str, TensorSpec]:
    """Every tensor the trunk needs (and, with `mtp`, the draft stages), by canonical key, in the model's order.

    One entry per routed expert: `layers.3.ffn.experts.17.w1`. Scales are not listed: they follow from the format.
    """
    specs = {spec.name: spec for spec in _owned(config, "", None, {"top"})}
    for index, layer in enumerate(config.layers):
        owners = {"block", layer.kind, "hash" if layer.hash else "score"}
        if layer.kind != "window":
            owners.add("compressed")
        specs |= {spec.name: spec for spec in _owned(config, f"layers.{index}", layer, owners)}
    for index, layer in enumerate(config.mtp_layers if mtp else ()):
        specs |= {spec.name: spec for spec in _owned(config, f"mtp.{index}", layer, _draft_owners(config, index))}
    return specs


def _draft_owners(config: ModelConfig, index: int) -> set[str]:
    owners = {"block", "score"}
    if config.dspark is None:
        return owners | {"mtp", "draft_head"}
    if index == 0:
        owners.add("dspark_first")
    if index == len(config.mtp_layers) - 1:
        owners |= {"dspark_last", "draft_head"}
    return owners


def _owned(config: ModelConfig, block: str, layer: LayerSpec | None, owners: set[str]) -> Iterator[TensorSpec]:
    dims = dimensions(config, layer)
    for row in ROWS:
        if row.owner not in owners:
            continue
        shape = tuple(_evaluate(axis, dims) for axis in row.shape)
        for expert in range(config.n_routed_experts) if row.role == "expert" else (0,):
            tail = row.name.replace("{e}", str(expert))
            name, about = f"{block}.{tail}" if block else tail, (row.role, row.stored, row.component, row.nvfp4)
            yield TensorSpec(name, shape, *about, block, row.split)


def _evaluate(axis: str, dims: dict[str, int]) -> int:
    """Value of a shape axis such as `H*Dh/G` or `M*M+2*M`."""
    total = 0
    for term in axis.split("+"):
        value = 1
        for operator, factor in re.findall(r"([*/]?)(\w+)", term):
            number = int(factor) if factor.isdigit() else dims[factor]
            value = value // number if operator == "/" else value * number
        total += value
    return total


_BLOCK = re.compile(r"(layers|mtp)\.(\d+)\.(.+)")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@cache
def _tails() -> tuple[dict[str, str], dict[str, str]]:
    """(top level, blocks): any name below its owner -> official name, with `{e}` for the expert, parts left out."""
    tables: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for row in ROWS:
        for name in (row.name, *row.aliases):
            tables[row.owner != "top"][name] = row.name
    return tables


def canonical_name(name: str) -> str:
    """The official name of the tensor called `name` in a file; an unknown name comes back without its `model.`.

    `model.layers.0.self_attn.q_a_proj.weight_packed` -> `layers.0.attn.wq_a.weight_packed`; parts are kept.
    """
    name = name.removeprefix("model.")
    match = _BLOCK.fullmatch(name)
    prefix, tail = (f"{match[1]}.{match[2]}.", match[3]) if match else ("", name)
    table = _tails()[match is not None]
    expert = _EXPERT.search(tail)
    pattern = _EXPERT.sub(".experts.{e}.", tail)
    module, _, part = pattern.rpartition(".")
    if pattern in table:
        official = table[pattern]
    elif part in PARTS and module in table:
        official = f"{table[module]}.{part}"
    else:
        return name
    return prefix + official.replace("{e}", expert[1] if expert else "")


def split_part(name: str) -> tuple[str, str]:
    """(key, part) of a canonical tensor name: the module path and one of PARTS, or (name, "") for a parameter."""
    module, _, part = name.rpartition(".")
    tail = _EXPERT.sub(".experts.{e}.", module)
    match = _BLOCK.fullmatch(tail)
    if part in PARTS and (match[3] if match else tail) in _linear_names()[match is not None]:
        return module, part
    return name, ""


@cache
def _linear_names() -> tuple[frozenset[str], frozenset[str]]:
    linears = [row for row in ROWS if row.role != "param"]
    top = frozenset(row.name for row in linears if row.owner == "top")
    return top, frozenset(row.name for row in linears if row.owner != "top")
