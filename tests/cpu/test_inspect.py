"""`dsv4 inspect` from a config alone and from files: the published figures, the stored bytes, and what it refuses."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import typer
from oracle.hf import Case, build
from oracle.writer import official_config, write_checkpoint
from typer.testing import CliRunner, Result

from dsv4.checkpoint.sizes import kv_bytes, kv_sizes
from dsv4.cli.inspect import inspect
from dsv4.config import ModelConfig
from dsv4.errors import CheckpointError, ConfigError
from dsv4.testing.checkpoints import Format, write_random_checkpoint

app = typer.Typer()
app.command()(inspect)


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1"}).invoke(app, list(arguments))


def document(*arguments: str, code: int = 0) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


# ------------------------------------------------------------------------------------------------- from the config


@pytest.mark.parametrize(
    ("name", "trunk", "both", "active", "linear_params", "floor", "everything_native"),
    [
        ("flash", 284_332_240_471, 290_942_289_362, 13_270_105_687, 13_234_339_840, 7.580, 11.218),
        ("pro", 1_572_997_201_763, 1_598_837_347_742, 48_852_409_187, 48_765_075_456, 27.767, 39.667),
    ],
)
def test_published_figures_from_the_config_alone(
    name: str, trunk: int, both: int, active: int, linear_params: int, floor: float, everything_native: float
) -> None:
    found = document(f"random:{name}")
    parameters, reads = found["parameters"], found["decode_floor_per_token"]
    assert parameters["trunk_params"] == trunk
    assert parameters["trunk_and_draft_params"] == both
    assert parameters["active_params_per_token"] == active
    assert parameters["active_linears_params"] == linear_params
    assert reads["all_linear_nvfp4"]["linears_bytes"] == linear_params * 9 // 16
    assert round(reads["all_linear_nvfp4"]["linears_and_mhc_bytes"] / 1e9, 3) == floor
    assert round(reads["native"]["total_bytes"] / 1e9, 3) == everything_native
    assert found["checkpoint"] is None and found["problems"] == []


@pytest.mark.parametrize(
    ("name", "megabytes"),
    [
        ("flash", {"attention": 2587.0, "experts": 3652.2, "shared_experts": 608.7, "compressors": 146.3,
                   "indexer": 127.0, "router": 25.4, "lm_head": 297.9}),
        ("pro", {"attention": 10290.1, "experts": 13600.2, "shared_experts": 2266.7, "compressors": 375.7,
                 "indexer": 282.0, "router": 94.4, "lm_head": 521.3}),
    ],
)  # fmt: skip
def test_published_bytes_of_every_part(name: str, megabytes: dict[str, float]) -> None:
    parts = document(f"random:{name}")["decode_floor_per_token"]["all_linear_nvfp4"]["linears_by_component_bytes"]
    assert {part: round(nbytes / 1e6, 1) for part, nbytes in parts.items()} == megabytes


KV = {  # tokens: csa, index keys, hca, windows
    "flash": {131072: (401_866_752, 46_792_704, 11_960_320, 3_214_336),
              1048576: (3_214_934_016, 374_341_632, 95_682_560, 3_214_336)},
    "pro": {131072: (574_095_360, 66_846_720, 18_538_496, 4_559_872),
            1048576: (4_592_762_880, 534_773_760, 148_307_968, 4_559_872)},
}  # fmt: skip
KV_ROUNDED = {  # tokens: total, with FP8 index keys, read per token; MB below a gigabyte, else GB
    "flash": {131072: (463.8e6, 507.9e6, 68e6), 1048576: (3.688e9, 4.040e9, 480e6)},
    "pro": {131072: (664.0e6, 727.0e6, 108e6), 1048576: (5.280e9, 5.784e9, 706e6)},
}


@pytest.mark.parametrize(("name", "slope", "states"), [("flash", 3514.25, 12.2e6), ("pro", 5031.4375, 18.7e6)])
def test_published_kv_bytes(name: str, slope: float, states: float) -> None:
    kv = document(f"random:{name}")["kv_cache"]
    assert (kv["entry_bytes"], kv["index_key_bytes"], kv["index_key_fp8_bytes"]) == (584, 68, 132)
    assert kv["bytes_per_token"] == slope
    assert kv["state_bytes_per_sequence"] == pytest.approx(states, rel=5e-3)
    layers = 43 if name == "flash" else 61
    assert kv["window_bytes_per_sequence"] == layers * 74_752
    for tokens, parts in KV[name].items():
        found = kv["context_tokens"][str(tokens)]
        assert tuple(found[f"{key}_bytes"] for key in ("csa", "index_keys", "hca", "windows")) == parts
        assert found["total_bytes"] == sum(parts)
        rounded = tuple(found[key] for key in ("total_bytes", "total_fp8_index_bytes", "read_bytes_per_token"))
        assert rounded == pytest.approx(KV_ROUNDED[name][tokens], rel=7e-3)


def test_states_of_one_layer_of_each_kind() -> None:
    """CSA 64 KiB and 16 KiB for its indexer, HCA 512 KiB, in FP32."""
    flash = ModelConfig.from_name("random:flash")
    assert kv_sizes(flash).states == 21 * (64 + 16) * 1024 + 20 * 512 * 1024


def test_kv_of_short_sequences_counts_whole_entries_only() -> None:
    flash = ModelConfig.from_name("random:flash")
    assert kv_bytes(flash, 3)["csa"] == 0 and kv_bytes(flash, 127)["hca"] == 0
    assert kv_bytes(flash, 4)["csa"] == 21 * 584 and kv_bytes(flash, 128)["hca"] == 20 * 584


def test_small_model_gets_its_own_context() -> None:
    assert list(document("random:tiny")["kv_cache"]["context_tokens"]) == ["4096"]


def test_keys_are_stable() -> None:
    """Other programs read these; a change here breaks them."""
    found = document("random:tiny")
    assert list(found) == [
        "source", "config", "parameters", "resident_bytes", "decode_floor_per_token", "kv_cache", "checkpoint",
        "problems",
    ]  # fmt: skip
    assert list(found["resident_bytes"]) == list(found["decode_floor_per_token"])
    assert list(found["resident_bytes"]) == ["native", "nvfp4", "all_linear_nvfp4", "all_linear_nvfp4_bf16_head"]
    assert found["config"]["layers"] == {"window": 2, "csa": 2, "hca": 1, "hash": 2}
    assert found["config"]["compress_ratios"] == [0, 4, 16, 4, 0]


# -------------------------------------------------------------------------------------------------- from the files


def data_bytes(folder: Path) -> int:
    """Bytes after the headers of all files: what is stored, without asking the code under test."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as handle:
            header = struct.unpack("<Q", handle.read(8))[0]
        total += file.stat().st_size - 8 - header
    return total


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("official"), official_config([0, 4, 128]))


def test_official_folder(official: Path) -> None:
    found = document(str(official))
    stored = found["checkpoint"]
    assert stored["stored_bytes"] == data_bytes(official)
    assert stored["stored_bytes"] == stored["loaded_bytes"] + stored["unused"]["stored_bytes"]
    assert stored["files"] == 5
    # the headers agree with what the config says an official checkpoint holds
    native = found["resident_bytes"]["native"]
    for component, formats in stored["components"].items():
        assert sum(cell["stored_bytes"] for cell in formats.values()) == native["by_component_bytes"][component]
        params = sum(cell["params"] for cell in formats.values())
        assert params == found["parameters"]["by_component_params"].get(component, 0)
    assert set(stored["components"]["experts"]) == {"mxfp4"} and set(stored["components"]["shared_experts"]) == {"fp8"}
    assert set(stored["components"]["indexer"]) == {"fp8", "bf16", "f32"}
    assert stored["decode_floor_per_token"] == found["decode_floor_per_token"]["native"]
    assert sum(cell["stored_bytes"] for cell in stored["formats"].values()) == stored["loaded_bytes"]


def test_draft_blocks_are_unused_and_counted(official: Path) -> None:
    stored = document(str(official))["checkpoint"]
    unused = stored["unused"]
    assert unused["tensors"] == sum(unused["names"].values())
    assert all(name.startswith("mtp.0.") for name in unused["names"])
    assert unused["names"]["mtp.0.ffn.experts.*.w1.weight"] == 8
    assert sum(cell["stored_bytes"] for cell in stored["draft"].values()) == unused["stored_bytes"]
    assert set(stored["draft"]) == {"mxfp4", "fp8", "bf16", "f32"}


@pytest.mark.parametrize(
    ("layout", "experts", "attention", "draft_experts"),
    [
        ("official", "mxfp4", "fp8", "mxfp4"),
        ("modelopt", "nvfp4", "fp8", "mxfp4"),
        ("modelopt-all", "nvfp4", "nvfp4", "mxfp4"),
        ("compressed-tensors", "nvfp4", "fp8", "bf16"),
        ("bf16", "bf16", "bf16", "bf16"),
    ],
)
def test_formats_are_read_per_tensor(
    layout: Format, experts: str, attention: str, draft_experts: str, tmp_path: Path
) -> None:
    """Configs of these releases say little of it, and some of it wrong; only the tensors tell."""
    write_random_checkpoint(tmp_path, ModelConfig.from_name("random:tiny"), format=layout, shards=2)
    stored = document(str(tmp_path))["checkpoint"]
    assert set(stored["components"]["experts"]) == {experts}
    assert set(stored["components"]["attention"]) == {attention, "f32"}  # the sinks stay F32
    assert draft_experts in stored["draft"]
    assert ("nvfp4" in stored["draft"]) == (draft_experts == "nvfp4")
    assert stored["stored_bytes"] == data_bytes(tmp_path)


def test_folder_saved_by_transformers(tmp_path: Path) -> None:
    model = build(Case(0, "WCH", hashed=(1,)), tmp_path)
    found = document(str(tmp_path))
    assert found["checkpoint"]["unused"] == {"tensors": 0, "stored_bytes": 0, "names": {}}
    assert found["checkpoint"]["draft"] == {} and set(found["checkpoint"]["formats"]) == {"f32", "i64"}
    table = model.model.layers[1].mlp.gate.tid2eid.numel()
    weights = sum(tensor.numel() for tensor in model.state_dict().values()) - table
    assert found["parameters"]["trunk_params"] == found["checkpoint"]["formats"]["f32"]["params"] == weights


def rewrite(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_problems_are_listed_beside_what_can_be_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, official_config([0, 4]))
    rewrite(tmp_path, num_hash_layers=0, vocab_size=100)  # a table too many, a bias too few, three wrong shapes
    found = document(str(tmp_path), code=1)
    text = "\n".join(found["problems"])
    for name in ("layers.0.ffn.gate.tid2eid: extra", "layers.0.ffn.gate.bias: missing", "embed.weight", "head.weight"):
        assert name in text
    assert found["checkpoint"]["tensors"] > 100
    tables = run(str(tmp_path))
    assert tables.exit_code == 1 and tables.stdout.count("problem ") == len(found["problems"])


def test_truncated_file_is_a_problem(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, official_config([0]))
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert any("truncated" in problem for problem in document(str(tmp_path), code=1)["problems"])


def test_bad_config_raises_with_every_finding(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, official_config([0]))
    rewrite(tmp_path, hidden_act="gelu", extra=1)
    result = run(str(tmp_path))
    assert isinstance(result.exception, ConfigError)
    assert "2 findings" in str(result.exception)


def test_nothing_there_raises(tmp_path: Path) -> None:
    assert isinstance(run(str(tmp_path / "absent")).exception, CheckpointError)
    assert isinstance(run("random:huge").exception, ConfigError)


# ---------------------------------------------------------------------------------------------------- for people


def test_tables_fit_a_narrow_terminal_and_carry_the_figures(official: Path) -> None:
    for path, figures in (
        ("random:flash", ("284,332,240,471", "13,270,105,687", "7.580 GB", "11.218 GB", "463.834 MB", "3,514.25 B")),
        ("random:pro", ("1,572,997,201,763", "48,852,409,187", "27.767 GB", "39.667 GB", "5.280 GB", "5,031.44 B")),
        (str(official), ("mxfp4", "fp8", "as stored here", "Unused without speculation")),
    ):
        result = run(path)
        assert result.exit_code == 0
        assert "…" not in result.stdout  # nothing cut off
        assert max(map(len, result.stdout.splitlines())) <= 80
        for figure in figures:
            assert re.search(rf"(?<!\d){re.escape(figure)}(?!\d)", result.stdout), figure
