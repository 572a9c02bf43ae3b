"""Numeric settings with a name, for tables and comparisons: how weights are stored and what is rounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch import Tensor

from dsv4.checkpoint.load import Policy, load_model_weights
from dsv4.checkpoint.names import TensorSpec, expected_tensors
from dsv4.checkpoint.plan import stack_name
from dsv4.config import ModelConfig
from dsv4.errors import RequestError
from dsv4.layers.settings import Settings, check_device
from dsv4.model import Model
from dsv4.quant.weights import FP8Weight, MXFP4Weight, NVFP4Weight, PlainWeight, Weight

WeightForm = Literal["native", "bf16", "official", "nvfp4-experts", "nvfp4"]


@dataclass(frozen=True)
class Setting:
    """`weights`: native as stored; bf16 every linear in BF16; official FP4 experts and FP8, as DeepSeek stores them;
    nvfp4-experts NVFP4 experts and FP8, as NVIDIA does; nvfp4 every large linear. What already has the form is kept
    bit for bit, the rest is rounded anew. The other fields are those of dsv4.load.
    """

    weights: WeightForm = "native"
    act: Literal["bf16", "fp8", "nvfp4"] = "bf16"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    kv_quant: bool = True
    index_quant: bool = True

    def __str__(self) -> str:
        return ",".join(f"{f.name}={_shown(getattr(self, f.name))}" for f in fields(self))


NAMED: dict[str, Setting] = {
    "bf16": Setting("bf16", "bf16", kv_quant=False, index_quant=False),
    "official": Setting("official", "fp8"),
    "nvfp4-w4a16": Setting("nvfp4-experts", "bf16"),
    "nvfp4-w4a4": Setting("nvfp4-experts", "nvfp4"),
    "all-linear-nvfp4": Setting("nvfp4", "nvfp4"),
}


def _shown(value: str | bool) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def parse_setting(text: str) -> Setting:
    """`NAME`, `key=value` pairs joined by commas, or both: "official,dtype=float32". RequestError lists the choices."""
    setting = Setting()
    for part in filter(None, text.split(",")):
        key, given, value = part.partition("=")
        if not given:
            if key not in NAMED:
                raise RequestError(f"no setting is called {key!r}; names are {', '.join(NAMED)}, or give key=value")
            setting = NAMED[key]
            continue
        choices = _choices()
        if key not in choices:
            raise RequestError(f"a setting has no {key!r}; it has {', '.join(choices)}")
        if value not in choices[key]:
            raise RequestError(f"{key} cannot be {value!r}; choose one of {', '.join(choices[key])}")
        change: dict[str, Any] = {key: {"on": True, "off": False}.get(value, value)}
        setting = replace(setting, **change)
    return setting


def _choices() -> dict[str, tuple[str, ...]]:
    """Key -> the values it takes, as they are written."""
    return {name: get_args(hint) or ("on", "off") for name, hint in get_type_hints(Setting).items()}


def load_setting(model: str, setting: Setting, *, device: str = "cpu") -> Model:
    """The model with its weights in the setting's form."""
    check_device(device)
    policy: Policy = "nvfp4" if setting.weights == "nvfp4" else "native"
    config, weights, folder = load_model_weights(model, policy=policy, device=device)
    if setting.weights in FORMS:
        weights = recast(config, weights, FORMS[setting.weights])
    settings = Settings.parse(config, setting.dtype, setting.act, setting.kv_quant, setting.index_quant)
    return Model(config, weights, settings, device=device, path=folder)


FORMS: dict[str, Callable[[TensorSpec], str]] = {
    "bf16": lambda spec: "bf16",
    "official": lambda spec: "mxfp4" if spec.stored == "fp4" else spec.stored,
    "nvfp4-experts": lambda spec: "nvfp4" if spec.role == "expert" else spec.stored,
}


def recast(
    config: ModelConfig, weights: dict[str, Weight | Tensor], form: Callable[[TensorSpec], str]
) -> dict[str, Weight | Tensor]:
    """The weights with every linear in the format that `form` names for it."""
    specs = {stack_name(spec.name): spec for spec in expected_tensors(config).values()}
    return {
        name: _cast(weight, form(specs[name]), name) if isinstance(weight, Weight) else weight
        for name, weight in weights.items()
    }


def _cast(weight: Weight, form: str, name: str) -> Weight:
    if weight.format == form:
        return weight
    if form in ("bf16", "f32"):
        return PlainWeight(weight.dequantize(torch.bfloat16 if form == "bf16" else torch.float32))
    values = weight.dequantize(torch.float32)
    if form == "nvfp4":
        return NVFP4Weight.quantize(values, name=name)
    return MXFP4Weight.quantize(values, name=name) if form == "mxfp4" else FP8Weight.quantize(values, name=name)
