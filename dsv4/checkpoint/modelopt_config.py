"""The `quantization_config` and hf_quant_config.json that other engines expect beside ModelOpt's NVFP4 tensors.

dsv4 itself decides per tensor and only reports these keys.
"""

from typing import Any

from dsv4.quant import nvfp4

PRODUCER = {"name": "dsv4"}
FP8_KEYS = {"fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
IGNORED_EXPERTS_ONLY = ["*.attn.*", "*.ffn.shared_experts.*", "*.ffn.gate", "head"]
IGNORED_ALL_LINEAR = ["*.ffn.gate", "*.attn.indexer.weights_proj"]
_NVFP4 = {"quant_algo": "NVFP4", "group_size": nvfp4.GROUP}


def quantization_config(
    modules: list[str], *, all_linear: bool, fp8_scale_fmt: str | None, draft_kept: bool = True
) -> dict[str, Any]:
    """The keys for a checkpoint whose `modules` (`layers.0.ffn.experts`, `head`, ...) are NVFP4.

    fp8_scale_fmt: "ue8m0" or "float32" when FP8 tensors remain, else None. draft_kept: `mtp.*` holds no NVFP4.
    """
    ignored = (IGNORED_ALL_LINEAR if all_linear else IGNORED_EXPERTS_ONLY) + (["mtp.*"] if draft_kept else [])
    four_bits = {"num_bits": 4, "type": "float", "group_size": nvfp4.GROUP, "dynamic": False}
    base: dict[str, Any] = {"quant_method": "modelopt"}
    if fp8_scale_fmt is not None:
        base = {"quant_method": "fp8", **FP8_KEYS, "scale_fmt": fp8_scale_fmt}
    return base | {
        "quant_algo": "MIXED_PRECISION",
        "moe_quant_algo": "NVFP4",
        "group_size": nvfp4.GROUP,
        "kv_cache_quant_algo": None,
        "producer": PRODUCER,
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": four_bits, "input_activations": four_bits},
        },
        "quantized_layers": dict.fromkeys(modules, _NVFP4),
        "ignore": ignored,
    }


def hf_quant_config(keys: dict[str, Any]) -> dict[str, Any]:
    """The same facts in the form of ModelOpt's hf_quant_config.json."""
    return {
        "producer": PRODUCER,
        "quantization": {
            "quant_algo": keys["quant_algo"],
            "kv_cache_quant_algo": keys["kv_cache_quant_algo"],
            "quantized_layers": keys["quantized_layers"],
            "exclude_modules": keys["ignore"],
        },
    }
