"""`dsv4 quantize`: what it writes is NVFP4 in ModelOpt's layout, equal where it claims to be, whole or not there."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from checkpoint_files import SMALL, decode, memory_needed
from oracle import hf
from oracle.files import Stored, read_folder
from typer.testing import CliRunner

from dsv4.checkpoint import load_model_weights
from dsv4.checkpoint.quantize import REPORT_NAME, quantize_checkpoint
from dsv4.checkpoint.reader import INDEX_NAME
from dsv4.cli.quantize import quantize as command
from dsv4.errors import Dsv4Error
from dsv4.quant.weights import NVFP4Weight, Weight
from dsv4.testing.checkpoints import write_random_checkpoint

EXPERTS = [f"layers.{layer}.ffn.experts.{e}.w{i}" for layer in range(3) for e in range(3) for i in (1, 2, 3)]


def same(a: Stored, b: Stored) -> bool:
    return a.dtype == b.dtype and a.raw.tobytes() == b.raw.tobytes() and a.raw.shape == b.raw.shape


def same_factors(a: Stored, b: Stored) -> bool:
    return np.array_equal(a.floats(), b.floats())


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "source", tmp_path / "made"


def test_experts_of_an_official_checkpoint_are_recast_exactly(paths: tuple[Path, Path]) -> None:
    source, made = paths
    write_random_checkpoint(source, SMALL, shards=2)
    result = quantize_checkpoint(source, made)
    assert sorted(result.converted) == sorted(EXPERTS)
    assert sorted(c.name for c in result.conversions) == sorted(EXPERTS)
    assert all(c.exact and c.error == 0 and (c.before, c.after) == ("mxfp4", "nvfp4") for c in result.conversions)
    before, after = read_folder(source), read_folder(made)
    for name in EXPERTS:
        np.testing.assert_array_equal(decode(after, name, "modelopt"), decode(before, name, "official"))
        n, k = decode(before, name, "official").shape
        assert (after[f"{name}.weight"].dtype, after[f"{name}.weight"].raw.shape) == ("U8", (n, k // 2))
        assert (after[f"{name}.weight_scale"].dtype, after[f"{name}.weight_scale"].raw.shape) == (
            "F8_E4M3",
            (n, k // 16),
        )
        assert (after[f"{name}.weight_scale_2"].dtype, after[f"{name}.weight_scale_2"].raw.shape) == ("F32", ())
        assert after[f"{name}.input_scale"].dtype == "F32" and after[f"{name}.input_scale"].raw == 1.0
        assert f"{name}.scale" not in after
    shared = {name: after[f"{name}.weight_scale_2"].raw.item() for name in EXPERTS}
    assert all(shared[name] == shared[name[:-1] + "3"] for name in EXPERTS if name.endswith("w1"))
    rest = {name for name in before if name.rpartition(".")[0] not in EXPERTS}
    assert rest == {name for name in after if name.rpartition(".")[0] not in EXPERTS}
    assert all(same(before[name], after[name]) for name in rest)
    assert any(name.startswith("mtp.0.ffn.experts.2.w1.scale") for name in rest)


@pytest.mark.parametrize("format", ["official", "modelopt", "compressed-tensors", "bf16"])
def test_all_linear_converts_every_large_linear_of_the_trunk(paths: tuple[Path, Path], format: Any) -> None:
    source, made = paths
    write_random_checkpoint(source, SMALL, format=format)
    result = quantize_checkpoint(source, made, all_linear=True)
    was, now = load_model_weights(source, mtp=True).weights, load_model_weights(made, mtp=True).weights
    assert was.keys() == now.keys()
    errors = {c.name: c.error for c in result.conversions}
    for key, weight in now.items():
        before = was[key]
        if not isinstance(weight, Weight):
            assert torch.equal(weight, before), key
            continue
        large = not key.endswith(("ffn.gate", "weights_proj")) and not key.startswith("mtp.")
        assert weight.format == ("nvfp4" if large else before.format), key
        error = float((weight.dequantize() - before.dequantize()).norm() / before.dequantize().norm())
        assert error == 0 if not large or before.format in ("mxfp4", "nvfp4") else 0.05 < error < 0.12, key
        if key in errors:
            assert abs(errors[key] - error) < 1e-6
    assert {"head", "layers.1.attn.compressor.wgate", "layers.1.attn.indexer.wq_b"} <= set(result.converted)


def test_the_same_values_as_the_policy_at_load(paths: tuple[Path, Path]) -> None:
    source, made = paths
    write_random_checkpoint(source, SMALL)
    quantize_checkpoint(source, made, all_linear=True)
    loaded, policy = load_model_weights(made).weights, load_model_weights(source, policy="nvfp4").weights
    for key, weight in policy.items():
        if isinstance(weight, NVFP4Weight):
            assert torch.equal(loaded[key].codes.view(torch.uint8), weight.codes), key
            assert torch.equal(loaded[key].dequantize(), weight.dequantize()), key


def test_what_transformers_saves_can_be_quantised(paths: tuple[Path, Path]) -> None:
    source, made = paths
    hf.build(hf.CASES[0], source).save_pretrained(source / "fused", save_original_format=False)
    for folder in (source, source / "fused"):
        quantize_checkpoint(folder, made)
        names = read_folder(made).keys()
        assert "layers.0.ffn.experts.5.w3.weight_scale_2" in names and "layers.0.attn.kv_norm.weight" in names
        assert not any("gate_up_proj" in name for name in names)
        was, now = load_model_weights(folder).weights["layers.1.ffn.experts.w3"], load_model_weights(made).weights
        error = (now["layers.1.ffn.experts.w3"].dequantize() - was.dequantize()).norm() / was.dequantize().norm()
        assert error < 0.12 and now["layers.0.attn.wq_a"].format == "f32"
        shutil.rmtree(made)


def test_the_folder_is_complete(paths: tuple[Path, Path]) -> None:
    source, made = paths
    write_random_checkpoint(source, SMALL)
    kept = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "encoding/encoding_dsv4.py", "LICENSE"]
    left = ["README.md", "pytorch_model.bin", "inference/model.py", "encoding/__pycache__/x.pyc"]
    for name in [*kept, *left]:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    (source / "tokenizer.json").unlink()
    (source.parent / "blob").write_text("tokenizer.json")
    (source / "tokenizer.json").symlink_to("../blob")
    result = quantize_checkpoint(source, made, shard_bytes=200_000)
    files = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()}
    shards = {name for name in files if name.endswith(".safetensors")}
    assert files - shards == {*kept, "config.json", "hf_quant_config.json", INDEX_NAME, REPORT_NAME}
    assert all((made / name).read_text() == name and not (made / name).is_symlink() for name in kept)
    assert len(shards) > 5 and f"model-00001-of-{len(shards):05d}.safetensors" in shards
    assert all((made / shard).stat().st_size < 220_000 for shard in shards)
    index = json.loads((made / INDEX_NAME).read_text())
    assert (
        index["metadata"]["total_size"] == sum(t.raw.nbytes for t in read_folder(made).values()) == result.bytes_after
    )
    assert made.stat().st_mode & 0o777 == source.stat().st_mode & 0o777
    assert {path.name for path in made.parent.iterdir()} == {"source", "made", "blob"}


def test_the_config_says_what_the_files_hold(paths: tuple[Path, Path]) -> None:
    source, made = paths
    write_random_checkpoint(source, SMALL)
    quantize_checkpoint(source, made)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in paths)
    keys = after.pop("quantization_config")
    old = before.pop("quantization_config")
    assert before == after and after["expert_dtype"] == "fp4"
    assert old.items() <= keys.items()
    assert (keys["quant_algo"], keys["moe_quant_algo"], keys["group_size"]) == ("MIXED_PRECISION", "NVFP4", 16)
    assert set(keys["quantized_layers"]) == {f"layers.{layer}.ffn.experts" for layer in range(3)}
    assert {"*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"} <= set(keys["ignore"])
    second = json.loads((made / "hf_quant_config.json").read_text())["quantization"]
    assert second["quantized_layers"] == keys["quantized_layers"] and second["exclude_modules"] == keys["ignore"]
    report = json.loads((made / REPORT_NAME).read_text())["weights"]
    assert {line["name"] for line in report} == set(EXPERTS) and all(line["exact"] for line in report)


def test_without_fp8_tensors_the_config_claims_none(paths: tuple[Path, Path]) -> None:
    source, made = paths
    write_random_checkpoint(source, SMALL, format="bf16")
    quantize_checkpoint(source, made, all_linear=True)
    keys = json.loads((made / "config.json").read_text())["quantization_config"]
    assert keys["quant_method"] == "modelopt" and "weight_block_size" not in keys
    assert {"head", "layers.0.attn.wq_a", "layers.2.ffn.experts"} <= set(keys["quantized_layers"])
    assert "head" not in keys["ignore"] and "*.ffn.gate" in keys["ignore"]


def test_a_dry_run_writes_nothing_and_knows_the_size(paths: tuple[Path, Path]) -> None:
    source, made = paths
    write_random_checkpoint(source, SMALL)
    planned = quantize_checkpoint(source, made, dry_run=True)
    assert planned.conversions == [] and [path.name for path in made.parent.iterdir()] == ["source"]
    done = quantize_checkpoint(source, made)
    assert (planned.converted, planned.kept, planned.bytes_after) == (done.converted, done.kept, done.bytes_after)


def test_memory_stays_near_one_shard(paths: tuple[Path, Path]) -> None:
    """130 MB in, pieces of 1 MB out: 9 MB are used."""
    source, made = paths
    big = SMALL | {"hidden_size": 768, "moe_intermediate_size": 512, "n_routed_experts": 16, "hc_mult": 2}
    write_random_checkpoint(source, big, format="bf16", mtp=False)
    call = f"quantize_checkpoint({str(source)!r}, {{!r}}, shard_bytes=1 << 20)"
    first, then = call.format(str(made)), call.format(str(source.parent / "again"))
    assert memory_needed(first, then) < 16 << 20


def test_the_command_reports_each_tensor(paths: tuple[Path, Path]) -> None:
    source, made = paths
    write_random_checkpoint(source, SMALL)
    app = typer.Typer()
    app.command()(command)
    run = CliRunner().invoke(app, [str(source), str(made), "--dry-run"])
    assert run.exit_code == 0 and "nothing was written" in run.output and not made.exists()
    run = CliRunner().invoke(app, [str(source), str(made), "--all-linear"])
    assert run.exit_code == 0, run.output
    lines = {line.split()[0]: line.split()[1:] for line in run.output.splitlines() if line.strip()}
    assert lines["layers.0.ffn.experts.w1"] == ["mxfp4", "3", "of", "3", "0"]
    assert lines["layers.0.attn.wq_a"][:2] == ["fp8", "no"] and 0.05 < float(lines["layers.0.attn.wq_a"][2]) < 0.12
    assert lines["head"][:2] == ["bf16", "no"]
    assert load_model_weights(made).weights["head"].format == "nvfp4"
    run = CliRunner().invoke(app, [str(source), str(made)])
    assert isinstance(run.exception, Dsv4Error) and "exists" in str(run.exception)
