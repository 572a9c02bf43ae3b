"""Every layout gives the values that a decoder written from the format's definition gives: bytes in, float64 out."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import SMALL, decode, rewrite, transformers_name
from oracle.files import Stored, read_folder

from dsv4.checkpoint import load_model_weights
from dsv4.checkpoint.random import random_tensors
from dsv4.config import ModelConfig
from dsv4.quant.weights import FP8Weight, MXFP4Weight, NVFP4Weight, Weight
from dsv4.testing.checkpoints import FORMATS, write_random_checkpoint


def decode_stack(tensors: dict[str, Stored], key: str, shape: tuple[int, ...], naming: str) -> np.ndarray:
    if len(shape) == 2:
        return decode(tensors, key, naming)
    head, _, projection = key.rpartition(".")
    return np.stack([decode(tensors, f"{head}.{e}.{projection}", naming) for e in range(shape[0])])


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("format", FORMATS)
def test_the_loaded_values_are_those_in_the_file(tmp_path: Path, format: Any, shards: int) -> None:
    write_random_checkpoint(tmp_path, SMALL, format=format, shards=shards, seed=5)
    stored = read_folder(tmp_path)
    config, weights, folder = load_model_weights(tmp_path, mtp=True)
    assert folder == tmp_path and config.num_hidden_layers == 3
    for key, value in weights.items():
        if isinstance(value, Weight):
            expected = decode_stack(stored, key, value.shape, format)
            # Only 1/global of compressed-tensors is rounded; every other layout is exact in float64.
            atol = 0.0 if not isinstance(value, NVFP4Weight) else 2e-7 * np.abs(expected).max()
            np.testing.assert_allclose(
                value.dequantize(torch.float64).numpy(), expected, rtol=0, atol=atol, err_msg=key
            )
            if format != "compressed-tensors":
                np.testing.assert_array_equal(value.dequantize(torch.float64).numpy(), expected, err_msg=key)
        else:
            name = transformers_name(key) if format == "compressed-tensors" else key
            file = stored.get(name.removeprefix("model.")) or stored[key]
            raw = file.raw if file.dtype == "I64" else file.floats()
            np.testing.assert_array_equal(value.double().numpy(), raw, err_msg=key)
            official_f32 = re.search(r"hc_|ape|attn_sink|gate\.bias", key)
            assert value.dtype == (
                torch.float32 if official_f32 else torch.int64 if "tid2eid" in key else torch.bfloat16
            )


FORMAT_OF = {
    "official": ("mxfp4", "fp8", "mxfp4", "bf16"),
    "modelopt": ("nvfp4", "fp8", "mxfp4", "bf16"),
    "modelopt-all": ("nvfp4", "nvfp4", "mxfp4", "nvfp4"),
    "compressed-tensors": ("nvfp4", "fp8", "bf16", "bf16"),
    "bf16": ("bf16", "bf16", "bf16", "bf16"),
}


@pytest.mark.parametrize("format", FORMATS)
def test_the_format_is_decided_per_tensor(tmp_path: Path, format: Any) -> None:
    """The config cannot tell: NVIDIA's claims FP8 and holds NVFP4 experts beside MXFP4 ones in the draft."""
    write_random_checkpoint(tmp_path, SMALL, format=format)
    _, weights, _ = load_model_weights(tmp_path, mtp=True)
    keys = ("layers.1.ffn.experts.w1", "layers.1.attn.wq_a", "mtp.0.ffn.experts.w2", "head")
    assert tuple(weights[key].format for key in keys) == FORMAT_OF[format]


@pytest.mark.parametrize("format", FORMATS)
def test_stored_values_are_near_their_masters(tmp_path: Path, format: Any) -> None:
    """Rounding to 4 bits keeps about 10 %, to FP8 3 %: a wrong nibble order, scale or factor is off by far more."""
    write_random_checkpoint(tmp_path, SMALL, format=format, seed=3)
    masters = random_tensors(ModelConfig.from_dict(SMALL), seed=3)
    _, weights, _ = load_model_weights(tmp_path, mtp=True)
    bounds = {"nvfp4": 0.12, "mxfp4": 0.14, "fp8": 0.04, "bf16": 0.0}
    for key, value in weights.items():
        if isinstance(value, Weight):
            head, _, last = key.rpartition(".")
            many = len(value.shape) == 3
            master = torch.stack([masters[f"{head}.{e}.{last}"] for e in range(3)]) if many else masters[key]
            error = (value.dequantize() - master.float()).norm() / master.float().norm()
            assert error <= bounds[value.format], key
        else:
            assert torch.equal(value, masters[key]), key


def test_scales_keep_their_bits(tmp_path: Path) -> None:
    """A numeric copy of E8M0 to uint8, or a sign-extending shift of int8, changes these bytes."""
    write_random_checkpoint(tmp_path, SMALL)
    stored = read_folder(tmp_path)
    _, weights, _ = load_model_weights(tmp_path)
    experts = weights["layers.1.ffn.experts.w1"]
    assert isinstance(experts, MXFP4Weight) and experts.shape == (3, 160, 96)
    for expert in range(3):
        name = f"layers.1.ffn.experts.{expert}.w1"
        np.testing.assert_array_equal(experts.scale[expert].numpy(), stored[f"{name}.scale"].raw)
        np.testing.assert_array_equal(experts.codes[expert].numpy(), stored[f"{name}.weight"].raw)
    assert int((experts.codes >= 128).sum()) > 1000
    fp8 = weights["layers.1.attn.wq_b"]
    assert isinstance(fp8, FP8Weight)
    np.testing.assert_array_equal(fp8.scale.numpy(), stored["layers.1.attn.wq_b.scale"].raw)


@pytest.mark.parametrize("suffix", ["scale", "weight_scale_inv", "weight_scale"])
def test_fp8_scales_may_be_f32_and_have_three_names(tmp_path: Path, suffix: str) -> None:
    """The Base releases hold F32 factors that are no powers of two; transformers and compressed-tensors rename them."""
    write_random_checkpoint(tmp_path, SMALL)
    module = "layers.0.attn.wq_b"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{module}.{suffix}"] = tensors.pop(f"{module}.scale").float() * 1.3

    rewrite(tmp_path, change)
    _, weights, _ = load_model_weights(tmp_path)
    expected = decode(read_folder(tmp_path), module, "official")
    np.testing.assert_allclose(weights[module].dequantize(torch.float64).numpy(), expected, rtol=1e-6)


def test_scalars_come_with_and_without_a_dimension(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "m", SMALL, format="modelopt")
    write_random_checkpoint(tmp_path / "c", SMALL, format="compressed-tensors")
    before = {kind: load_model_weights(tmp_path / kind).weights for kind in "mc"}

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(("scale_2", "input_scale", "global_scale")):
                tensors[name] = tensor.reshape(1) if tensor.ndim == 0 else tensor.reshape(())

    for kind in "mc":
        rewrite(tmp_path / kind, flip)
        after = load_model_weights(tmp_path / kind).weights["layers.2.ffn.experts.w3"]
        was = before[kind]["layers.2.ffn.experts.w3"]
        assert isinstance(after, NVFP4Weight) and isinstance(was, NVFP4Weight)
        assert after.global_scale.shape == (3,) and torch.equal(after.global_scale, was.global_scale)
        assert after.input_scale is not None and torch.equal(after.input_scale, was.input_scale)


def test_input_scale_of_compressed_tensors_is_inverted(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, SMALL, format="compressed-tensors")
    stored = read_folder(tmp_path)["layers.0.mlp.experts.0.gate_proj.input_global_scale"].floats()
    weight = load_model_weights(tmp_path).weights["layers.0.ffn.experts.w1"]
    assert isinstance(weight, NVFP4Weight)
    assert stored.tolist() == [256.0] and weight.input_scale.tolist() == [1 / 256] * 3


def test_a_missing_input_scale_is_no_fault(tmp_path: Path) -> None:
    """Weight-only exports have none; where only some experts have one, none is used."""
    write_random_checkpoint(tmp_path, SMALL, format="modelopt")
    rewrite(tmp_path, lambda tensors: tensors.pop("layers.0.ffn.experts.1.w2.input_scale"))
    weights = load_model_weights(tmp_path).weights
    partial, complete = weights["layers.0.ffn.experts.w2"], weights["layers.0.ffn.experts.w1"]
    assert isinstance(partial, NVFP4Weight) and partial.input_scale is None
    assert isinstance(complete, NVFP4Weight) and complete.input_scale.tolist() == [1.0] * 3


def test_unsigned_containers_are_the_same_bytes(tmp_path: Path) -> None:
    """Some writers store FP4 as U8 and E8M0 as U8."""
    write_random_checkpoint(tmp_path, SMALL)
    was = load_model_weights(tmp_path).weights["layers.0.ffn.experts.w2"]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if ".experts." in name:
                tensors[name] = tensors[name].view(torch.uint8)

    rewrite(tmp_path, change)
    assert torch.equal(load_model_weights(tmp_path).weights["layers.0.ffn.experts.w2"].dequantize(), was.dequantize())
