"""Loading as a whole: transformers' files, the policy "nvfp4", memory, the progress bar, and random weights."""

import os
import pty
import select
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import SMALL, memory_needed, rewrite, transformers_name
from oracle import hf

import dsv4
from dsv4.checkpoint import Checkpoint, load_model_weights
from dsv4.checkpoint.pack import Conversion
from dsv4.checkpoint.random import random_tensors
from dsv4.config import ModelConfig
from dsv4.quant.weights import NVFP4Weight, Weight
from dsv4.testing.checkpoints import FORMATS, official_keys, write_random_checkpoint

# -------------------------------------------------------------------------------------------- transformers' own files


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A float32 model of transformers with every layer kind, and where it saved itself."""
    folder = tmp_path_factory.mktemp("transformers")
    return hf.build(hf.CASES[0], folder / "float32"), folder


@pytest.mark.parametrize("how", ["float32", "modules", "shards", "bfloat16"])
def test_what_transformers_saves_loads(library: tuple[Any, Path], how: str) -> None:
    """In its default form (official names behind `model.`) and with its own module names (experts fused)."""
    model, folder = library
    if how == "modules":
        model.save_pretrained(folder / how, save_original_format=False)
    elif how == "shards":
        model.save_pretrained(folder / how, max_shard_size="300KB")
        assert len(list((folder / how).glob("*.safetensors"))) > 2
    elif how == "bfloat16":
        model.to(torch.bfloat16).save_pretrained(folder / how)
    state = model.state_dict()
    weights = load_model_weights(folder / how).weights
    used = set()
    for key, value in weights.items():
        tensor = value.dequantize() if isinstance(value, Weight) else value
        name = transformers_name(key)
        if ".ffn.experts." in key:
            head, half = name.rpartition(".")[0], state[f"{name.rpartition('.')[0]}.gate_up_proj"].shape[1] // 2
            fused, rows = {
                "w1": ("gate_up_proj", slice(0, half)),
                "w2": ("down_proj", slice(None)),
                "w3": ("gate_up_proj", slice(half, None)),
            }[key[-2:]]
            name, expected = f"{head}.{fused}", state[f"{head}.{fused}"][:, rows]
        else:
            name += ".weight" if isinstance(value, Weight) else ""
            expected = state[name]
        used.add(name)
        assert torch.equal(tensor.float(), expected.float()), key
    assert used == state.keys()


def test_a_bfloat16_file_gives_float32_where_the_release_has_it(library: tuple[Any, Path]) -> None:
    model, folder = library
    model.to(torch.bfloat16).save_pretrained(folder / "narrow")
    weights = load_model_weights(folder / "narrow").weights
    wide = {key.rpartition(".")[2] for key, value in weights.items() if getattr(value, "dtype", None) == torch.float32}
    assert wide == {
        "hc_head_fn", "hc_head_base", "hc_head_scale", "hc_attn_fn", "hc_attn_base", "hc_attn_scale", "hc_ffn_fn",
        "hc_ffn_base", "hc_ffn_scale", "attn_sink", "ape", "bias",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- the policy "nvfp4"

KEPT = ("ffn.gate", "weights_proj", "confidence_head.proj")


@pytest.mark.parametrize("format", FORMATS)
def test_the_policy_makes_nvfp4_of_every_large_linear(tmp_path: Path, format: Any) -> None:
    write_random_checkpoint(tmp_path, SMALL, format=format, seed=2)
    report: list[Conversion] = []
    native = load_model_weights(tmp_path, mtp=True).weights
    policy = load_model_weights(tmp_path, mtp=True, policy="nvfp4", report=report).weights
    assert policy.keys() == native.keys()
    for key, was in native.items():
        now = policy[key]
        if not isinstance(was, Weight):
            assert isinstance(now, torch.Tensor) and torch.equal(now, was), key
            continue
        assert isinstance(now, Weight) and now.shape == was.shape
        assert now.format == (was.format if key.endswith(KEPT) else "nvfp4"), key
        exact = was.format in ("nvfp4", "mxfp4") or key.endswith(KEPT)
        error = (now.dequantize() - was.dequantize()).norm() / was.dequantize().norm()
        assert error == 0 if exact else 0.05 < error < 0.12, key
    experts, linears = 3 * 3 * 4, sum(isinstance(w, Weight) and len(w.shape) == 2 for w in native.values())
    kept = sum(key.endswith(KEPT) for key in native)
    assert len(report) == experts + linears - kept
    for line in report:
        assert line.after == "nvfp4" and line.exact == (line.error == 0.0) == (line.before in ("nvfp4", "mxfp4")), line


def test_gate_and_up_share_one_global(tmp_path: Path) -> None:
    """Of an exact cast it is 2^(k_max - 8) over both; of a requantised pair it is the amax of both over 2688."""
    write_random_checkpoint(tmp_path / "official", SMALL)
    write_random_checkpoint(tmp_path / "bf16", SMALL, format="bf16")
    for name in ("official", "bf16"):
        native = load_model_weights(tmp_path / name).weights
        policy = load_model_weights(tmp_path / name, policy="nvfp4").weights
        for module in ("layers.1.ffn.experts", "layers.1.ffn.shared_experts"):
            w1, w2, w3 = (policy[f"{module}.w{i}"] for i in (1, 2, 3))
            assert isinstance(w1, NVFP4Weight) and isinstance(w2, NVFP4Weight) and isinstance(w3, NVFP4Weight)
            assert torch.equal(w1.global_scale, w3.global_scale)
            if name == "bf16":
                pair = torch.cat([native[f"{module}.w1"].dequantize(), native[f"{module}.w3"].dequantize()], dim=-2)
                torch.testing.assert_close(w1.global_scale, pair.abs().amax(dim=(-2, -1)) / 2688, rtol=2e-7, atol=0)
            elif module.endswith(".experts"):
                bits = torch.cat([native[f"{module}.w1"].scale, native[f"{module}.w3"].scale], dim=-2)
                assert w1.global_scale.tolist() == [2.0 ** (int(e) - 127 - 8) for e in bits.amax(dim=(-2, -1))]
                assert set(w1.scale.view(torch.uint8).unique().tolist()) <= {1, 2, 4, *range(8, 121, 8)}


def test_a_span_of_eighteen_octaves_is_not_exact(tmp_path: Path) -> None:
    """E4M3 holds the powers of two 2^-9 .. 2^8. Beyond, the cast says so, for that expert alone."""
    write_random_checkpoint(tmp_path, SMALL)
    name = "layers.1.ffn.experts.1"

    def spread(octaves: int) -> Any:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            for projection in ("w1", "w3"):
                scale = tensors[f"{name}.{projection}.scale"].view(torch.uint8)
                scale[:] = 120
                tensors[f"{name}.{projection}.weight"][0, 0] = 0x11  # codes of 0.5, so that halving them is not exact
            tensors[f"{name}.w3.scale"].view(torch.uint8)[0, 0] = 120 - octaves

        return change

    for octaves, exact in ((17, True), (18, False)):
        rewrite(tmp_path, spread(octaves))
        report: list[Conversion] = []
        load_model_weights(tmp_path, policy="nvfp4", report=report)
        inexact = {c.name: c.error for c in report if c.before == "mxfp4" and not c.exact}
        assert inexact.keys() == (set() if exact else {f"{name}.w3"})
        assert all(0 < error < 1e-4 for error in inexact.values())


# ------------------------------------------------------------------------------------------------- memory and progress


def test_memory_stays_near_the_result(tmp_path: Path) -> None:
    """Experts are 3/4 of these 67 MB. Gathering them before stacking would need them twice."""
    big = SMALL | {"hidden_size": 768, "moe_intermediate_size": 512, "n_routed_experts": 8, "hc_mult": 2}
    write_random_checkpoint(tmp_path, big, format="bf16", mtp=False)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 60e6
    load = f"load_model_weights({str(tmp_path)!r})"
    assert size < memory_needed(load, load) < 1.2 * size  # seen: 1.01 to 1.05, naively 1.9


def test_weights_do_not_depend_on_the_file_any_more(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, SMALL, format="modelopt")
    weights = load_model_weights(tmp_path).weights
    copies = {key: w.dequantize().clone() for key, w in weights.items() if isinstance(w, Weight)}
    embed = weights["embed.weight"].clone()
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(1 << 15)
        file.write(bytes((tmp_path / "model.safetensors").stat().st_size - (1 << 15)))
    assert torch.equal(weights["embed.weight"], embed)
    assert all(torch.equal(weights[key].dequantize(), copy) for key, copy in copies.items())


def test_the_bar_shows_on_a_terminal_only(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random_checkpoint(tmp_path, SMALL)
    load_model_weights(tmp_path)
    assert capfd.readouterr() == ("", "")
    for wanted, shows in ((None, True), (False, False)):
        leader, follower = pty.openpty()
        with os.fdopen(follower, "w") as terminal:
            monkeypatch.setattr(sys, "stderr", terminal)
            load_model_weights(tmp_path, progress=wanted)
            monkeypatch.undo()
            shown = os.read(leader, 100_000) if select.select([leader], [], [], 0)[0] else b""
        os.close(leader)
        assert (b"loading" in shown) == shows


def test_an_open_checkpoint_loads(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, SMALL)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert load_model_weights(checkpoint).folder == tmp_path
    assert load_model_weights(tmp_path / "model.safetensors").folder == tmp_path


# ------------------------------------------------------------------------------------------------------ random weights


def test_random_tiny_is_seeded_and_mixed_as_nvidia_ships() -> None:
    first, second = (load_model_weights("random:tiny", mtp=True) for _ in range(2))
    assert first.folder is None
    for key, value in first.weights.items():
        again = second.weights[key]
        if isinstance(value, Weight):
            assert torch.equal(value.dequantize(), again.dequantize())
        else:
            assert torch.equal(value, again)
    formats = {key: w.format for key, w in first.weights.items() if isinstance(w, Weight)}
    assert formats["layers.0.ffn.experts.w1"] == "nvfp4" and formats["mtp.0.ffn.experts.w1"] == "mxfp4"
    assert (
        formats["layers.0.attn.wo_a"] == formats["mtp.0.e_proj"] == formats["layers.0.ffn.shared_experts.w2"] == "fp8"
    )
    assert formats["head"] == formats["layers.1.attn.compressor.wkv"] == formats["layers.0.ffn.gate"] == "bf16"


def test_a_random_tensor_depends_on_seed_and_name_alone() -> None:
    config = ModelConfig.from_dict(SMALL)
    with_draft, without = random_tensors(config, 1), random_tensors(config, 1, mtp=False)
    assert without.keys() < with_draft.keys()
    assert all(torch.equal(without[name], with_draft[name]) for name in without)
    other = random_tensors(config, 2, mtp=False)
    assert not any(torch.equal(without[name], other[name]) for name in without)
    first = without["layers.1.ffn.experts.0.w1"]
    assert not torch.equal(first, without["layers.1.ffn.experts.1.w1"])


def test_no_random_tensor_is_trivial() -> None:
    for name, tensor in random_tensors(ModelConfig.from_name("random:tiny")).items():
        if name.endswith("tid2eid"):
            assert all(len(set(row)) == 3 for row in tensor.tolist()), name
            assert tensor.min() == 0 and tensor.max() == 6
        else:
            assert torch.isfinite(tensor).all()
            assert tensor.numel() == 1 or tensor.float().std() > 0.02, name


def test_a_config_survives_the_way_through_official_keys() -> None:
    for name in ("random:tiny", "random:flash", "random:pro"):
        config = ModelConfig.from_name(name)
        assert ModelConfig.from_dict(official_keys(config)) == config


@pytest.mark.parametrize("format", FORMATS)
def test_the_model_stays_finite_and_differs_little_between_formats(tmp_path: Path, format: Any) -> None:
    ids = torch.randint(0, SMALL["vocab_size"], (40,), generator=torch.Generator().manual_seed(0))
    write_random_checkpoint(tmp_path / "plain", SMALL, format="bf16", seed=4)
    write_random_checkpoint(tmp_path / format, SMALL, format=format, seed=4)
    plain, stored = (
        dsv4.load(tmp_path / name, dtype="float32", kv_quant=False, index_quant=False).logits(ids)
        for name in ("plain", format)
    )
    assert torch.isfinite(stored).all() and plain.std() > 0.5
    assert (stored - plain).norm() / plain.norm() < 0.5
