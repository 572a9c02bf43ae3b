"""From a config.json to a checked ModelConfig, or to one ConfigError with every finding."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dsv4.config import keys
from dsv4.config.findings import Findings, Reader, show
from dsv4.config.rope import parse_rope, parse_rope_dims
from dsv4.config.schedule import parse_hash, parse_kinds
from dsv4.config.spec import DSparkConfig, LayerSpec, ModelConfig, QuantizationConfig
from dsv4.errors import ConfigError

_KNOWN = {*keys.INTEGERS, *keys.POSITIVE_NUMBERS, *keys.FIXED_REQUIRED, *keys.FIXED_OPTIONAL, *keys.SPECIAL,
          *keys.IGNORED}  # fmt: skip
_DSPARK = ("dspark_block_size", "dspark_noise_token_id", "dspark_target_layer_ids", "dspark_markov_rank")


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`. Raises ConfigError when it is missing, is not JSON, or says one key twice."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in items]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"{file}: found {', '.join(twice)} twice, expected each key once; remove one of them")
        return dict(items)

    if not file.is_file():
        raise ConfigError(f"{file}: no such file, expected the config.json of a DeepSeek-V4 checkpoint folder")
    try:
        data = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not JSON ({error}); download the file again") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: found a {type(data).__name__}, expected a JSON object")
    return data


def parse(data: Mapping[str, Any], where: str) -> ModelConfig:
    """The body of ModelConfig.from_dict."""
    findings = Findings(where)
    _refuse_other_models(data, findings)
    _check_keys(data, findings)
    reader = Reader(data, findings)
    fields: dict[str, Any] = {key: reader.integer(key, minimum) for key, minimum in keys.INTEGERS.items()}
    fields |= {key: reader.positive(key) for key in keys.POSITIVE_NUMBERS}
    fields["n_shared_experts"] = 1
    fields["qk_rope_head_dim"] = parse_rope_dims(data, fields["head_dim"], findings)
    theta, compress_theta, scaling = parse_rope(data, findings)
    fields |= {"rope_theta": theta, "compress_rope_theta": compress_theta, "rope_scaling": scaling}
    fields |= {key: _token_id(data, key, fields["vocab_size"], findings) for key in ("bos_token_id", "eos_token_id")}
    fields["torch_dtype"] = _dtype(data, findings)
    fields["expert_dtype"] = _expert_dtype(data, findings)
    fields["quantization"] = _quantization(data.get("quantization_config"), findings)
    fields["dspark"] = dspark = _dspark(data, fields, findings)

    trunk, nextn = fields["num_hidden_layers"], fields["num_nextn_predict_layers"]
    # 0731 and 0813 still say num_nextn_predict_layers 1 although one stage per target layer ships.
    stages = len(dspark.target_layer_ids) if dspark else None if any(key in data for key in _DSPARK) else nextn
    kinds = hashed = None
    if trunk is not None and stages is not None:
        if dspark is not None and nextn not in (1, stages):
            findings.add("num_nextn_predict_layers", str(nextn), f"1 or {stages} (one per dspark target layer)")
        kinds, hashed = parse_kinds(data, trunk, stages, findings), parse_hash(data, trunk, findings)
    has_indexer = kinds is not None and any(kind == "csa" for kind, _ in kinds)
    _check_sizes(fields, has_indexer, findings)
    findings.raise_if_any()
    assert kinds is not None and hashed is not None and stages is not None  # or there would have been findings
    assert theta is not None and compress_theta is not None

    draft = LayerSpec("window", 0, False, theta, None)
    layers = tuple(
        LayerSpec(kind, ratio, layer in hashed, *((theta, None) if kind == "window" else (compress_theta, scaling)))
        for layer, (kind, ratio) in enumerate(kinds)
    )
    return ModelConfig(**fields, layers=layers, mtp_layers=(draft,) * stages)


def _refuse_other_models(data: Mapping[str, Any], findings: Findings) -> None:
    """Stop at once when the file describes another model: its other keys would only hide the reason."""
    model_type = data.get("model_type")
    what = next((text for key, text in keys.OTHER_MODELS.items() if key in data), None)
    if model_type not in (None, "deepseek_v4"):
        what = {"deepseek_v41": "DeepSeek-V4.1, another architecture"}.get(str(model_type), what or "another model")
    if what is None:
        return
    do = "give the folder of a V4-Flash or V4-Pro checkpoint (or Flash-0731, Pro-0813)"
    findings.add(
        "model_type", f"{show(model_type)}: {what}", "'deepseek_v4' with DeepSeek's Hugging Face key names", do
    )
    findings.raise_if_any()


def _check_keys(data: Mapping[str, Any], findings: Findings) -> None:
    for key in sorted(data):
        if key in keys.REMOTE_CODE:
            findings.add(key, show(data[key]), "no such key: dsv4 runs no code from a checkpoint", "remove the key")
        elif key not in _KNOWN:
            findings.add(key, show(data[key]), "no such key", "remove it if it changes nothing in the model")
    for key, value in (keys.FIXED_REQUIRED | keys.FIXED_OPTIONAL).items():
        if data.get(key) is None:  # transformers writes null for an optional key it does not know
            if key in keys.FIXED_REQUIRED:
                findings.add(key, "no such key", show(value), "take the key from the model's config.json")
        elif data[key] != value or isinstance(data[key], bool) != isinstance(value, bool):
            findings.add(key, show(data[key]), f"{show(value)}, the only value this engine computes")


def _token_id(data: Mapping[str, Any], key: str, vocab: int | None, findings: Findings) -> int | None:
    """A token id, or None for null; -1 is transformers' other way to write "none"."""
    if key not in data:
        findings.add(key, "no such key", "a token id or null", "take the key from the model's config.json")
        return None
    value = data[key]
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or value == -1:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < (vocab or value + 1):
        findings.add(key, show(value), f"null or one id below vocab_size = {vocab}")
        return None
    return value


def _dtype(data: Mapping[str, Any], findings: Findings) -> str:
    """torch_dtype, or `dtype` as transformers 5 calls it. Absent means bfloat16: tensors carry their own dtype."""
    given = {key: data[key] for key in ("torch_dtype", "dtype") if data.get(key) is not None}
    for key, value in given.items():
        if value not in ("bfloat16", "float32"):
            findings.add(key, show(value), "'bfloat16' or 'float32'", "convert the checkpoint")
    if len(set(map(str, given.values()))) > 1:
        findings.add("dtype", show(given["dtype"]), f"the same as torch_dtype = {show(given['torch_dtype'])}")
    return str(next(iter(given.values()), "bfloat16"))


def _expert_dtype(data: Mapping[str, Any], findings: Findings) -> str | None:
    value = data.get("expert_dtype")
    if value not in (None, "fp4", "fp8", "bf16"):
        findings.add("expert_dtype", show(value), "'fp4', 'fp8', 'bf16' or no such key")
        return None
    return value


def _quantization(value: Any, findings: Findings) -> QuantizationConfig | None:
    """Checks only what would make the stored bytes unreadable; the other entries are facts for the reader."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        findings.add("quantization_config", show(value), "a dict or null")
        return None
    method = value.get("quant_method")
    if method not in ("fp8", "modelopt", "compressed-tensors"):
        findings.add("quantization_config.quant_method", show(method), "'fp8', 'modelopt' or 'compressed-tensors'")
        return None
    allowed = {
        "weight_block_size": ([128, 128], None),
        "fmt": ("e4m3", None),
        "scale_fmt": ("ue8m0", "float32", None),
        "activation_scheme": ("dynamic", None),
    }
    for key, values in allowed.items():
        if value.get(key) not in values:
            do = "V4.1 has 32x32 blocks and is not supported" if key == "weight_block_size" else ""
            findings.add(f"quantization_config.{key}", show(value[key]), show(values[0]), do)
    return QuantizationConfig(method, MappingProxyType(copy.deepcopy(dict(value))))


def _dspark(data: Mapping[str, Any], fields: dict[str, Any], findings: Findings) -> DSparkConfig | None:
    if not any(key in data for key in _DSPARK):
        return None
    reader = Reader(data, findings)
    block, noise = reader.integer("dspark_block_size", 1), reader.integer("dspark_noise_token_id", 0)
    rank = reader.integer("dspark_markov_rank", 1)
    targets = reader.listing("dspark_target_layer_ids", "a list of trunk layers", None, int)
    trunk, vocab = fields["num_hidden_layers"], fields["vocab_size"]
    if noise is not None and vocab is not None and noise >= vocab:
        findings.add("dspark_noise_token_id", str(noise), f"an id below vocab_size = {vocab}")
    if (
        targets is not None
        and trunk is not None
        and not (targets and targets == sorted(set(targets)) and targets[0] >= 0 and targets[-1] < trunk)
    ):
        findings.add("dspark_target_layer_ids", show(targets), f"rising layer numbers below {trunk}")
    if block is None or noise is None or rank is None or targets is None:
        return None
    return DSparkConfig(block, noise, tuple(targets), rank)


def _check_sizes(fields: dict[str, Any], has_indexer: bool, findings: Findings) -> None:
    """Rules between sizes, each only where both sides could be read."""
    rules = [
        ("num_experts_per_tok", "n_routed_experts", lambda k, e: k <= e, "at most"),
        ("o_groups", "num_attention_heads", lambda g, h: h % g == 0, "a divisor of"),
        ("num_nextn_predict_layers", "num_hidden_layers", lambda n, layers: n <= layers, "at most"),
    ]
    if has_indexer:
        rules.append(("index_head_dim", "qk_rope_head_dim", lambda d, r: d >= r, "at least"))
    for small, large, rule, words in rules:
        a, b = fields[small], fields[large]
        if a is not None and b is not None and not rule(a, b):
            findings.add(small, str(a), f"{words} {large} = {b}")
