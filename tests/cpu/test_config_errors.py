"""Configurations that must not load: each bad value is fed once; the one error names key, found and expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from oracle.hf import Case, config_of

from dsv4.config import ModelConfig
from dsv4.config.keys import FIXED_REQUIRED, INTEGERS, POSITIVE_NUMBERS
from dsv4.errors import ConfigError

OFFICIAL = Path(__file__).parent / "data" / "config"


def flash(**changes: Any) -> dict[str, Any]:
    return json.loads((OFFICIAL / "flash.json").read_text()) | changes


def refreshed(**changes: Any) -> dict[str, Any]:
    return json.loads((OFFICIAL / "flash-0731.json").read_text()) | changes


def saved(**changes: Any) -> dict[str, Any]:
    """What transformers writes for three layers: window, CSA (hashed), HCA."""
    return config_of(Case(0, "WCH", hashed=(1,), yarn=True)).to_dict() | changes


def message(data: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(data, where="here")
    return str(caught.value)


def only_finding(data: dict[str, Any]) -> str:
    """The single finding of `data`; more than one means that a mistake is reported twice."""
    lines = message(data).splitlines()
    assert lines[0] == "here: 1 finding", lines
    return lines[1]


RATIOS = flash()["compress_ratios"]
YARN = flash()["rope_scaling"]
QUANT = flash()["quantization_config"]

BAD_VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": (flash(sparse_window=3), "sparse_window: found 3, expected no such key"),
    "text for a number": (flash(hidden_size="4096"), "hidden_size: found '4096', expected an integer >= 1"),
    "true for a number": (flash(index_topk=True), "index_topk: found True"),
    "fraction for an integer": (flash(head_dim=512.0), "head_dim: found 512.0"),
    "zero": (flash(q_lora_rank=0), "q_lora_rank: found 0, expected an integer >= 1"),
    "infinite": (flash(swiglu_limit=float("inf")), "swiglu_limit: found inf, expected a number > 0"),
    "not a number": (flash(rms_norm_eps=float("nan")), "rms_norm_eps: found nan"),
    "more experts than there are": (flash(num_experts_per_tok=257), "num_experts_per_tok: found 257, expected at most"),
    "groups that do not divide": (flash(o_groups=7), "o_groups: found 7, expected a divisor of num_attention"),
    "rope wider than a head": (flash(qk_rope_head_dim=514, index_head_dim=1024), "expected at most head_dim = 512"),
    "odd rope": (flash(qk_rope_head_dim=63), "qk_rope_head_dim: found 63, expected an even number"),
    "rope wider than an index head": (flash(index_head_dim=32), "index_head_dim: found 32, expected at least"),
    "schedule too short": (flash(compress_ratios=RATIOS[:-1]), "compress_ratios: found 43 entries, expected 44"),
    "schedule too long": (flash(compress_ratios=[*RATIOS, 0]), "compress_ratios: found 45 entries, expected 44"),
    "schedule of text": (flash(compress_ratios="0,4"), "compress_ratios: found '0,4'"),
    "a ratio of V4.1": (flash(compress_ratios=[2, *RATIOS[1:]]), "compress_ratios[0]: found 2, expected 0, 4 or more"),
    "compressed draft stage": (flash(compress_ratios=[*RATIOS[:-1], 4]), "compress_ratios[43]: found 4, expected 0"),
    "too many hash layers": (flash(num_hash_layers=44), "num_hash_layers: found 44, expected at most"),
    "other activation": (flash(hidden_act="gelu"), "hidden_act: found 'gelu', expected 'silu'"),
    "other scoring": (flash(scoring_func="sigmoid"), "scoring_func: found 'sigmoid', expected 'sqrtsoftplus'"),
    "other selection": (flash(topk_method="group_limited_greedy"), "topk_method: found 'group_limited_greedy'"),
    "unnormalised weights": (flash(norm_topk_prob=False), "norm_topk_prob: found False, expected True"),
    "two shared experts": (flash(n_shared_experts=2), "n_shared_experts: found 2, expected 1"),
    "attention bias": (flash(attention_bias=True), "attention_bias: found True"),
    "false written as 0": (flash(attention_bias=0), "attention_bias: found 0, expected False"),
    "tied embeddings": (flash(tie_word_embeddings=True), "tie_word_embeddings: found True"),
    "separate values": (flash(num_key_value_heads=8), "num_key_value_heads: found 8, expected 1"),
    "other class": (flash(architectures=["LlamaForCausalLM"]), "architectures: found ['LlamaForCausalLM']"),
    "half precision": (flash(torch_dtype="float16"), "torch_dtype: found 'float16', expected 'bfloat16' or 'float32'"),
    "two dtypes": (flash(dtype="float32"), "dtype: found 'float32', expected the same as torch_dtype"),
    "eos outside the vocabulary": (flash(eos_token_id=129280), "eos_token_id: found 129280"),
    "several eos": (flash(eos_token_id=[1, 2]), "eos_token_id: found [1, 2]"),
    "expert dtype": (flash(expert_dtype="int4"), "expert_dtype: found 'int4'"),
    "scaling as text": (flash(rope_scaling="yarn"), "rope_scaling: found 'yarn', expected a dict or null"),
    "other scaling": (flash(rope_scaling=YARN | {"type": "linear"}), "rope_scaling.rope_type: found 'linear'"),
    "yarn with mscale": (flash(rope_scaling=YARN | {"mscale": 0.7}), "rope_scaling.mscale: found 0.7, expected 1.0"),
    "yarn without factor": (flash(rope_scaling={"type": "yarn", "original_max_position_embeddings": 1, "beta_fast": 2,
                                                "beta_slow": 1}), "rope_scaling.factor: found no such key"),
    "shrinking yarn": (flash(rope_scaling=YARN | {"factor": 0.5}), "rope_scaling.factor: found 0.5"),
    "yarn ramp reversed": (flash(rope_scaling=YARN | {"beta_fast": 1}), "rope_scaling.beta_fast: found 1"),
    "unknown yarn key": (flash(rope_scaling=YARN | {"gamma": 1}), "rope_scaling.gamma: found 1, expected no such key"),
    "other quantiser": (flash(quantization_config={"quant_method": "gptq"}), "quant_method: found 'gptq'"),
    "quantiser as text": (flash(quantization_config="fp8"), "quantization_config: found 'fp8'"),
    "small blocks": (flash(quantization_config=QUANT | {"weight_block_size": [32, 32]}),
                     "weight_block_size: found [32, 32], expected [128, 128]; V4.1"),
    "other fp8": (flash(quantization_config=QUANT | {"fmt": "e5m2"}), "quantization_config.fmt: found 'e5m2'"),
    "remote code": (flash(auto_map={"AutoModel": "evil.Model"}), "dsv4 runs no code from a checkpoint"),
    "hidden remote code": (flash(_attn_implementation_internal="org/kernel"), "dsv4 runs no code from a checkpoint"),
    "dspark half given": ({k: v for k, v in refreshed().items() if k != "dspark_markov_rank"},
                          "dspark_markov_rank: found no such key"),
    "dspark target outside": (refreshed(dspark_target_layer_ids=[40, 41, 43]), "rising layer numbers below 43"),
    "dspark targets unordered": (refreshed(dspark_target_layer_ids=[41, 40, 42]), "dspark_target_layer_ids: found [41"),
    "dspark noise outside": (refreshed(dspark_noise_token_id=129280), "dspark_noise_token_id: found 129280"),
    "dspark stages miscounted": (refreshed(num_nextn_predict_layers=2), "found 2, expected 1 or 3"),
    "transformers: unknown layer type": (saved(layer_types=["full_attention"] * 3), "layer_types: found 'full_att"),
    "transformers: short layer_types": (saved(layer_types=["sliding_attention"]), "layer_types: found 1 entries"),
    "transformers: unknown mlp type": (saved(mlp_layer_types=["moe", "dense", "moe"]), "mlp_layer_types: found 'den"),
    "transformers: short mlp types": (saved(mlp_layer_types=["moe"]), "mlp_layer_types: found 1 entries, expected 3"),
    "transformers: no rate": (saved(compress_rates={"compressed_sparse_attention": 4}),
                              "compress_rates.heavily_compressed_attention: found no such key"),
    "transformers: flat rope": (saved(rope_parameters={"rope_type": "default"}), "rope_parameters: found"),
    "transformers: rotary share": (saved(partial_rotary_factor=0.5), "partial_rotary_factor: found 0.5, expected 16"),
    "transformers: rotary share, no number": (saved(partial_rotary_factor=float("nan")), "found nan, expected 16"),
    "more draft stages than layers": (saved(num_nextn_predict_layers=10**12), "expected at most num_hidden_layers = 3"),
    "transformers: schedules disagree": (saved(compress_ratios=[0, 128, 4]),
                                         "layer_types[1]: found csa at ratio 4, expected hca at ratio 128"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_VALUES)
def test_bad_value_is_one_clear_finding(name: str) -> None:
    data, expected = BAD_VALUES[name]
    assert expected in only_finding(data)


SCHEDULE_KEYS = ("compress_ratios", "num_hash_layers", "rope_theta", "compress_rope_theta", "rope_scaling",
                 "qk_rope_head_dim", "bos_token_id", "eos_token_id")  # fmt: skip


@pytest.mark.parametrize("key", [*INTEGERS, *POSITIVE_NUMBERS, *FIXED_REQUIRED, *SCHEDULE_KEYS])
def test_missing_key_is_named(key: str) -> None:
    data = flash()
    del data[key]
    assert f"  - {key}: found no such key, expected " in only_finding(data)


def test_all_findings_come_at_once() -> None:
    text = message(flash(hidden_size=-1, spare=1, hidden_act="relu", compress_ratios=[0], o_groups=3))
    assert text.startswith("here: 5 findings")
    for key in ("hidden_size", "spare", "hidden_act", "compress_ratios", "o_groups"):
        assert f"  - {key}: found " in text


OTHER_MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "V4.1": (
        {"model_type": "deepseek_v41", "text_config": {}, "vision_config": {}},
        "DeepSeek-V4.1, another architecture",
    ),
    "V4.1 text part": (flash(engram_layer_ids=[1, 14]), "a V4.1 config"),
    "Vision": (flash(vision_n_layers=32), "a Vision config"),
    "V3": (flash(model_type="deepseek_v3"), "'deepseek_v3': another model"),
    "inference names": ({"vocab_size": 129280, "dim": 4096, "n_layers": 43}, "inference/config.json"),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_another_model_is_recognised_not_picked_apart(name: str) -> None:
    data, expected = OTHER_MODELS[name]
    assert expected in only_finding(data)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such file"),
        ("{", "not JSON"),
        ("[1]", "found a list, expected a JSON object"),
        ('{"hidden_size": 1, "hidden_size": 2}', "found hidden_size twice"),
        ("[" * 200_000, "not JSON"),
    ],
)
def test_unreadable_file(content: str | None, expected: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=expected):
        ModelConfig.from_path(tmp_path)


def test_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not JSON"):
        ModelConfig.from_path(tmp_path)


def test_message_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(flash(spare=1)))
    with pytest.raises(ConfigError, match=str(tmp_path / "config.json")):
        ModelConfig.from_path(tmp_path)


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match="'random:huge' is no named configuration; expected one of random:tiny"):
        ModelConfig.from_name("random:huge")
