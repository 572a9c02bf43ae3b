"""Configurations that must load: the four official files, what transformers writes, and the named ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle.hf import CASES, Case, config_of
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from dsv4.config import LayerSpec, ModelConfig, YarnScaling

OFFICIAL = Path(__file__).parent / "data" / "config"
RELEASES = ("flash", "pro", "flash-0731", "pro-0813")
YARN = YarnScaling(factor=16.0, original_max_position_embeddings=65536, beta_fast=32.0, beta_slow=1.0)


def release(name: str) -> dict[str, Any]:
    return json.loads((OFFICIAL / f"{name}.json").read_text())


@pytest.mark.parametrize("name", RELEASES)
def test_official_file_loads_with_every_value(name: str, tmp_path: Path) -> None:
    data = release(name)
    (tmp_path / "config.json").write_text(json.dumps(data))
    config = ModelConfig.from_path(tmp_path)
    assert config == ModelConfig.from_path(OFFICIAL / f"{name}.json") == ModelConfig.from_dict(data)
    same = {field.name for field in dataclasses.fields(config)} & data.keys() - {"rope_scaling"}
    assert len(same) == 30 + ("expert_dtype" in data)
    for key in sorted(same):
        assert getattr(config, key) == data[key], key
    assert config.rope_scaling == YARN
    assert config.quantization is not None and config.quantization.facts == data["quantization_config"]


def test_schedules_are_those_of_the_releases() -> None:
    flash, pro = ModelConfig.from_dict(release("flash")), ModelConfig.from_dict(release("pro"))
    assert flash.layer_counts == {"window": 2, "csa": 21, "hca": 20}
    assert pro.layer_counts == {"window": 0, "csa": 30, "hca": 31}
    assert flash.layers[0] == LayerSpec("window", 0, True, 10000.0, None)
    assert flash.layers[2] == LayerSpec("csa", 4, True, 160000.0, YARN)
    assert flash.layers[3] == LayerSpec("hca", 128, False, 160000.0, YARN)
    assert pro.layers[0] == LayerSpec("hca", 128, True, 160000.0, YARN)
    for config in (flash, pro):
        assert [layer.hash for layer in config.layers[:4]] == [True, True, True, False]
        assert not any(layer.hash for layer in config.layers[4:])
        assert config.layers[-1].kind == "csa"
        assert config.mtp_layers == (LayerSpec("window", 0, False, 10000.0, None),)


@pytest.mark.parametrize(
    ("name", "plain", "targets"), [("flash-0731", "flash", (40, 41, 42)), ("pro-0813", "pro", (58, 59, 60))]
)
def test_refresh_is_the_same_trunk_with_three_draft_stages(name: str, plain: str, targets: tuple[int, ...]) -> None:
    refresh, first = ModelConfig.from_dict(release(name)), ModelConfig.from_dict(release(plain))
    assert refresh.layers == first.layers
    assert refresh.num_nextn_predict_layers == 1 and len(refresh.mtp_layers) == 3
    assert refresh.dspark is not None and first.dspark is None
    assert refresh.dspark.target_layer_ids == targets
    assert (refresh.dspark.block_size, refresh.dspark.noise_token_id) == (5, 128799)
    assert refresh.dspark.markov_rank == (256 if plain == "flash" else 512)
    honest = release(name) | {"num_nextn_predict_layers": 3}
    assert ModelConfig.from_dict(honest).mtp_layers == refresh.mtp_layers


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_named_configs_are_the_official_ones(name: str) -> None:
    named, official = ModelConfig.from_name(f"random:{name}"), ModelConfig.from_dict(release(name))
    assert dataclasses.replace(named, expert_dtype=official.expert_dtype) == official


def test_tiny_has_every_mechanism_at_odd_sizes() -> None:
    tiny = ModelConfig.from_name("random:tiny")
    assert all(tiny.layer_counts.values()) and tiny.mtp_layers
    assert {layer.hash for layer in tiny.layers} == {True, False}
    assert any(layer.hash and layer.kind == "csa" for layer in tiny.layers)
    assert tiny.hidden_size % 128 and tiny.moe_intermediate_size % 128 and tiny.vocab_size % 2
    # the quantisers it was trained with accept it
    assert (tiny.head_dim - tiny.qk_rope_head_dim) % 64 == 0
    assert tiny.index_head_dim >= 32 and tiny.index_head_dim & (tiny.index_head_dim - 1) == 0
    inputs = (tiny.hidden_size, tiny.q_lora_rank, tiny.o_groups * tiny.o_lora_rank)
    assert all(size % 16 == 0 for size in inputs)
    assert tiny.num_attention_heads * tiny.head_dim // tiny.o_groups % 16 == 0
    assert tiny.hidden_size % 32 == 0 and tiny.moe_intermediate_size % 32 == 0
    assert tiny.index_topk < 100 // 4  # selects within a hundred tokens


def test_config_is_frozen_and_hashable() -> None:
    config = ModelConfig.from_name("random:tiny")
    assert hash(config) == hash(ModelConfig.from_name("random:tiny"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1  # type: ignore[misc]
    assert config.quantization is not None
    with pytest.raises(TypeError):
        config.quantization.facts["quant_method"] = "none"  # type: ignore[index]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_transformers_saves_loads(case: Case, tmp_path: Path) -> None:
    theirs = config_of(case)
    theirs.save_pretrained(tmp_path)
    ours = ModelConfig.from_path(tmp_path)
    letters = {"window": "W", "csa": "C", "hca": "H"}
    assert "".join(letters[layer.kind] for layer in ours.layers) == case.layers
    assert tuple(i for i, layer in enumerate(ours.layers) if layer.hash) == case.hashed
    assert ours.qk_rope_head_dim == theirs.qk_rope_head_dim and ours.head_dim == theirs.head_dim
    for layer in ours.layers:
        assert layer.ratio == {"window": 0, "csa": 4, "hca": case.hca}[layer.kind]
        assert layer.rope_theta == (10000.0 if layer.kind == "window" else 160000.0)
        assert (layer.yarn is not None) == (case.yarn and layer.kind != "window")
    assert ours.mtp_layers == () and ours.quantization is None


def test_saved_transformers_model_loads_with_its_dtype(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 2}
    DeepseekV4ForCausalLM(config_of(Case(0, "WCH", sizes=sizes))).to(torch.float32).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    assert ModelConfig.from_path(tmp_path).torch_dtype == "float32"


def test_official_config_survives_transformers(tmp_path: Path) -> None:
    """transformers rewrites every schedule key; the trunk must come out the same."""
    DeepseekV4Config(**release("flash")).save_pretrained(tmp_path)
    ours, official = ModelConfig.from_path(tmp_path), ModelConfig.from_dict(release("flash"))
    assert ours.layers == official.layers and ours.mtp_layers == official.mtp_layers


def saved(**changes: Any) -> dict[str, Any]:
    return config_of(Case(0, "WCH", hashed=(1,), yarn=True)).to_dict() | changes


def without(data: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in keys}


def test_legacy_compress_rate_keys() -> None:
    data = without(saved(compress_rate_csa=8, compress_rate_hca=32), "compress_rates")
    assert [layer.ratio for layer in ModelConfig.from_dict(data).layers] == [0, 8, 32]


def test_rope_dims_come_from_either_key() -> None:
    full = ModelConfig.from_dict(saved())
    assert ModelConfig.from_dict(without(saved(), "qk_rope_head_dim")) == full
    assert ModelConfig.from_dict(without(saved(), "partial_rotary_factor")) == full


def test_ids_that_mean_none() -> None:
    for none in (None, -1):
        config = ModelConfig.from_dict(saved(bos_token_id=none, eos_token_id=none))
        assert (config.bos_token_id, config.eos_token_id) == (None, None)
    assert ModelConfig.from_dict(saved(eos_token_id=[7])).eos_token_id == 7


def test_hca_ratio_need_not_be_128() -> None:
    data = release("flash")
    data["compress_ratios"][3] = 16
    assert ModelConfig.from_dict(data).layers[3] == LayerSpec("hca", 16, False, 160000.0, YARN)


@pytest.mark.parametrize(
    ("facts", "label"),
    [
        (
            {"quant_method": "fp8", "quant_algo": "MIXED_PRECISION", "moe_quant_algo": "NVFP4", "group_size": 16,
             "weight_block_size": [128, 128], "fmt": "e4m3", "scale_fmt": "ue8m0", "activation_scheme": "dynamic",
             "quantized_layers": {"layers.0.ffn.experts": {"quant_algo": "NVFP4"}}, "ignore": ["head", "mtp.*"]},
            "fp8 (MIXED_PRECISION)",
        ),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, "modelopt (NVFP4)"),
        ({"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": {}},
         "compressed-tensors (mixed-precision)"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
    ],
)  # fmt: skip
def test_quantization_is_kept_as_facts(facts: dict[str, Any], label: str) -> None:
    config = ModelConfig.from_dict(release("flash") | {"quantization_config": facts})
    assert config.quantization is not None
    assert config.quantization.facts == facts and config.quantization.label == label


def test_plain_checkpoint_has_no_quantization() -> None:
    assert ModelConfig.from_dict(without(release("flash"), "quantization_config", "expert_dtype")).quantization is None
