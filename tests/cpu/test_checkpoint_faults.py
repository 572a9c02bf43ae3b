"""Tensors that do not fit the config or hold impossible numbers: every fault is found, all of them in one error."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import SMALL, rewrite

from dsv4.checkpoint import load_model_weights
from dsv4.checkpoint.faults import Faults
from dsv4.checkpoint.load import open_source
from dsv4.checkpoint.reader import INDEX_NAME
from dsv4.errors import CheckpointError, ConfigError
from dsv4.testing.checkpoints import write_random_checkpoint

Tensors = dict[str, torch.Tensor]
NAN, INF = float("nan"), float("inf")
WQ, W1, CT = "layers.1.attn.wq_a", "layers.1.ffn.experts.2.w1", "model.layers.1.mlp.experts.2.gate_proj"
GLOBAL = f"{CT}.weight_global_scale"


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, value: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: value})


def poke(name: str, value: float) -> Callable[[Tensors], object]:
    """Sets the second element; bytes of E8M0 and E4M3 are set as bytes."""

    def change(tensors: Tensors) -> None:
        flat = tensors[name].view(torch.uint8 if tensors[name].element_size() == 1 else tensors[name].dtype).view(-1)
        flat[min(1, flat.numel() - 1)] = value

    return change


def rename(old: str, new: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def both(*changes: Callable[[Tensors], object]) -> Callable[[Tensors], object]:
    return lambda tensors: [change(tensors) for change in changes]


# name -> (layout, change, what the message must say)
FAULTS: dict[str, tuple[str, Callable[[Tensors], object], list[str]]] = {
    "missing parameter": ("official", drop("layers.2.attn.attn_sink"), ["layers.2.attn.attn_sink: missing", "[6]"]),
    "missing linear": ("bf16", drop("head.weight"), ["head.weight: missing, expected shape [331, 96]"]),
    "missing expert": ("bf16", drop(f"{W1}.weight"), [f"{W1}.weight: missing, expected shape [160, 96]"]),
    "missing fp8 scale": ("official", drop(f"{WQ}.scale"), [f"{WQ}.scale: missing; FP8 128x128 needs F8_E8M0 or F32"]),
    "missing mxfp4 scale": ("official", drop(f"{W1}.scale"), [f"{W1}.scale: missing; MXFP4 needs", "[160, 3]"]),
    "missing fp8 data": ("official", drop(f"{WQ}.weight"), [f"{WQ}: no known way to store a weight (scale F8_E8M0)"]),
    "missing nvfp4 scale": ("modelopt", drop(f"{W1}.weight_scale"), [f"{W1}.weight_scale: missing; NVFP4 (ModelOpt)"]),
    "missing nvfp4 global": ("modelopt", drop(f"{W1}.weight_scale_2"), [f"{W1}.weight_scale_2: missing; NVFP4"]),
    "missing packed": ("compressed-tensors", drop(f"{CT}.weight_packed"), [f"{W1}.weight_packed: missing"]),
    "missing ct global": ("compressed-tensors", drop(GLOBAL), [f"{W1}.weight_global_scale: missing"]),
    "extra tensor": ("official", put("layers.0.attn.wq_c.weight", torch.ones(2)), ["layers.0.attn.wq_c.weight: extra"]),
    "extra layer": ("bf16", put("layers.3.attn_norm.weight", torch.ones(96)), ["layers.3.attn_norm.weight: extra"]),
    "bias in a hash layer": ("bf16", put("layers.0.ffn.gate.bias", torch.ones(3)), ["layers.0.ffn.gate.bias: extra"]),
    "scale beside bf16": ("bf16", put(f"{WQ}.scale", torch.ones(1, 1)), [f"{WQ}.scale: unexpected beside plain"]),
    "two layouts at once": (
        "modelopt",
        put(f"{W1}.weight_packed", torch.zeros(160, 48, dtype=torch.uint8)),
        [
            f"{W1}.weight: unexpected beside NVFP4 (compressed-tensors)",
            f"{W1}.weight_scale_2: unexpected",
            "4 problems",
        ],
    ),
    "same tensor by two names": (
        "bf16",
        put("model.embed_tokens.weight", torch.ones(331, 96)),
        ["is the same tensor", "embed"],
    ),
    "wrong shape": ("bf16", put("norm.weight", torch.ones(95)), ["norm.weight: shape [95], expected [96]"]),
    "transposed linear": (
        "bf16",
        put(f"{WQ}.weight", torch.ones(96, 48)),
        [f"{WQ}.weight: shape [96, 48], expected [48, 96]"],
    ),
    "one scale for all": (
        "official",
        put("layers.0.attn.wq_b.scale", torch.ones(1, 1)),
        ["layers.0.attn.wq_b.scale: shape [1, 1], expected [4, 1]"],
    ),
    "group of 32 in nvfp4": (
        "modelopt",
        put(f"{W1}.weight_scale", torch.ones(160, 3).to(torch.float8_e4m3fn)),
        [f"{W1}.weight_scale: shape [160, 3], expected [160, 6]"],
    ),
    "global per row": ("modelopt", put(f"{W1}.weight_scale_2", torch.ones(160)), ["shape [160], expected [] or [1]"]),
    "wrong dtype": ("bf16", put("norm.weight", torch.ones(96, dtype=torch.int32)), ["norm.weight: dtype I32"]),
    "half precision": (
        "bf16",
        put(f"{WQ}.weight", torch.ones(48, 96, dtype=torch.float16)),
        [f"{WQ}: no known way to store a weight (weight F16)"],
    ),
    "float table": (
        "bf16",
        put("layers.0.ffn.gate.tid2eid", torch.zeros(331, 2)),
        ["tid2eid: dtype F32, expected I64 or I32"],
    ),
    "e5m2 weight": (
        "official",
        put(f"{WQ}.weight", torch.ones(48, 96).to(torch.float8_e5m2)),
        [f"{WQ}: no known way to store a weight (", "weight F8_E5M2"],
    ),
    "expert id out of range": ("bf16", poke("layers.0.ffn.gate.tid2eid", 3), ["expert ids 0..3, expected 0..2"]),
    "negative expert id": ("bf16", poke("layers.0.ffn.gate.tid2eid", -1), ["expert ids -1..2, expected 0..2"]),
    "nan e8m0 of fp8": ("official", poke(f"{WQ}.scale", 255), [f"{WQ}.scale: 1 of 1 values are NaN or Inf"]),
    "nan e8m0 of mxfp4": ("official", poke(f"{W1}.scale", 255), [f"{W1}.scale: 1 of 480 values", "first at [0, 1]"]),
    "nan fp8 data": ("official", poke(f"{WQ}.weight", 0xFF), [f"{WQ}.weight: 1 of 4608 values", "[0, 1]"]),
    "nan e4m3 scale": ("modelopt", poke(f"{W1}.weight_scale", 0x7F), [f"{W1}.weight_scale: 1 of 960 values are NaN"]),
    "negative scale": ("modelopt", poke(f"{W1}.weight_scale", 0xB8), [f"{W1}.weight_scale: 1 of 960 values are neg"]),
    "zero global": ("modelopt", poke(f"{W1}.weight_scale_2", 0.0), [f"{W1}.weight_scale_2: 1 of 1 values are zero or"]),
    "infinite global": ("modelopt", poke(f"{W1}.weight_scale_2", INF), [f"{W1}.weight_scale_2: 1 of 1 values are NaN"]),
    "nan input scale": ("modelopt", poke(f"{W1}.input_scale", NAN), [f"{W1}.input_scale: 1 of 1 values are NaN"]),
    "zero ct global": ("compressed-tensors", poke(GLOBAL, 0.0), [f"{GLOBAL}: 1 of 1"]),
    "infinite ct global": ("compressed-tensors", poke(GLOBAL, INF), [f"{GLOBAL}: 1 of"]),
    "nan parameter": ("bf16", poke("layers.1.attn.compressor.ape", NAN), ["compressor.ape: 1 of 640", "[0, 1]"]),
    "infinite bf16 weight": ("bf16", poke(f"{WQ}.weight", INF), [f"{WQ}.weight: 1 of 4608 values are NaN or Inf"]),
    "two missing": ("bf16", both(drop("head.weight"), drop("norm.weight")), ["head.weight", "norm", "2 problems"]),
    "missing and nan scale": (
        "official",
        both(drop("norm.weight"), poke(f"{W1}.scale", 255)),
        ["norm.weight: missing", f"{W1}.scale: 1 of 480 values", "2 problems"],
    ),
    "two nan scales": (
        "modelopt",
        both(poke(f"{W1}.weight_scale_2", NAN), poke("layers.2.ffn.gate.bias", NAN)),
        [f"{W1}.weight_scale_2", "layers.2.ffn.gate.bias", "2 problems"],
    ),
    "shape and dtype": (
        "bf16",
        put("norm.weight", torch.ones(95, dtype=torch.int32)),
        ["norm.weight: dtype I32", "norm.weight: shape [95]", "2 problems"],
    ),
    "mixed experts": (
        "bf16",
        put(f"{W1}.weight", torch.ones(160, 96)),
        ["layers.1.ffn.experts.w1: experts stored in different formats (bf16: experts 0, 1; f32: experts 2)", "nvfp4"],
    ),
}


@pytest.mark.parametrize("case", FAULTS, ids=[name.replace(" ", "-") for name in FAULTS])
def test_a_bad_checkpoint_is_refused(tmp_path: Path, case: str) -> None:
    layout, change, expected = FAULTS[case]
    write_random_checkpoint(tmp_path, SMALL, format=layout)  # type: ignore[arg-type]
    rewrite(tmp_path, change)
    with pytest.raises(CheckpointError) as caught:
        load_model_weights(tmp_path)
    message = str(caught.value)
    for text in [*expected, str(tmp_path)]:
        assert text in message, f"{text!r} is not in:\n{message}"
    problems = 1 if "problems" not in expected[-1] else int(expected[-1].split()[0])
    assert message.count("\n  - ") == problems, message


def spoil_shard(folder: Path) -> None:
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def test_faults_of_files_names_and_numbers_come_together(tmp_path: Path) -> None:
    """A truncated shard, a missing shard, a tensor of wrong shape and a NaN scale: four findings, and none repeated."""
    write_random_checkpoint(tmp_path, SMALL | {"sliding_window": 24}, shards=3)
    index = json.loads((tmp_path / INDEX_NAME).read_text())["weight_map"]
    third = tmp_path / "model-00003-of-00003.safetensors"
    lost = [name for name, file in index.items() if file == third.name]
    third.unlink()
    spoil_shard(tmp_path)
    first = tmp_path / "model-00001-of-00003.safetensors"
    first.rename(tmp_path / "model.safetensors")
    scale = next(name for name, file in index.items() if file == first.name and name.endswith("w1.scale"))
    norm = next(name for name, file in index.items() if file == first.name and name.endswith("norm.weight"))
    rewrite(tmp_path, both(put(norm, torch.ones(7)), poke(scale, 255)))
    (tmp_path / "model.safetensors").rename(first)
    with pytest.raises(CheckpointError) as caught:
        load_model_weights(tmp_path)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 4, lines
    assert any("model-00002-of-00003.safetensors: truncated" in line for line in lines)
    assert any(
        f"model-00003-of-00003.safetensors: missing shard; {INDEX_NAME} puts {len(lost)}" in line for line in lines
    )
    assert any(f"{norm}: shape [7]" in line for line in lines)
    assert any(f"{scale}: 1 of" in line for line in lines)


def test_a_bad_config_beside_bad_files_is_told_too(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, SMALL, shards=3)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        load_model_weights(tmp_path)
    spoil_shard(tmp_path)
    with pytest.raises(CheckpointError, match=r"(?s)truncated.*config\.json: not JSON"):
        load_model_weights(tmp_path)


def test_draft_tensors_are_never_extra(tmp_path: Path) -> None:
    """Known or not, they are left alone until the draft is asked for; then they are checked like the rest."""
    write_random_checkpoint(tmp_path, SMALL)
    rewrite(tmp_path, put("mtp.0.emb.tok_emb.weight", torch.ones(1)))
    assert not any(key.startswith("mtp.") for key in load_model_weights(tmp_path).weights)
    with pytest.raises(CheckpointError, match=r"mtp\.0\.emb\.tok_emb\.weight: extra"):
        load_model_weights(tmp_path, mtp=True)


def test_a_draft_that_is_not_there_is_missed_only_when_asked_for(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, SMALL, mtp=False)
    load_model_weights(tmp_path)
    with pytest.raises(CheckpointError, match=r"mtp\.0\.e_proj\.weight: missing"):
        load_model_weights(tmp_path, mtp=True)


def test_mixed_experts_load_when_they_are_converted(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, SMALL)
    rewrite(tmp_path, both(drop(f"{W1}.scale"), put(f"{W1}.weight", torch.randn(160, 96))))
    with pytest.raises(CheckpointError, match=r"mxfp4: experts 0, 1; f32: experts 2"):
        load_model_weights(tmp_path)
    assert load_model_weights(tmp_path, policy="nvfp4").weights["layers.1.ffn.experts.w1"].shape == (3, 160, 96)


@pytest.mark.parametrize("name", ["random:flash", "random:pro"])
def test_a_configuration_too_large_for_stored_tensors_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="has no stored tensors"):
        open_source(name, Faults())


def test_unknown_names_and_policies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="random:huge"):
        load_model_weights("random:huge")
    bad: Any = "int8"
    with pytest.raises(CheckpointError, match="policy 'int8' is unknown; expected one of native, nvfp4"):
        load_model_weights("random:tiny", policy=bad)
