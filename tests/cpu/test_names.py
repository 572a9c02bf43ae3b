"""The table of tensor names against transformers' own files and modules, and against DeepSeek's published totals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from oracle.hf import CASES, Case, build, config_of
from safetensors import safe_open
from transformers import DeepseekV4ForCausalLM

from dsv4.checkpoint.names import PARTS, ROWS, canonical_name, expected_tensors, split_part
from dsv4.checkpoint.sizes import COMPONENTS, SCHEMES, count, format_bytes
from dsv4.config import ModelConfig

OFFICIAL = Path(__file__).parent / "data" / "config"


def release(name: str) -> ModelConfig:
    return ModelConfig.from_path(OFFICIAL / f"{name}.json")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_file_saved_by_transformers_holds_exactly_these(case: Case, tmp_path: Path) -> None:
    build(case, tmp_path)
    found = {}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for name in list(file.keys()):
            found[canonical_name(name)] = tuple(file.get_slice(name).get_shape())
    expected = expected_tensors(ModelConfig.from_path(tmp_path))
    assert found == {spec.weight_name: spec.shape for spec in expected.values()}


def test_modules_of_transformers_have_the_same_names(tmp_path: Path) -> None:
    """compressed-tensors files use module names; experts are one module each there, fused in transformers itself."""
    case = Case(0, "WCH", hashed=(1,))
    config_of(case).save_pretrained(tmp_path)
    expected = {spec.weight_name: spec.shape for spec in expected_tensors(ModelConfig.from_path(tmp_path)).values()}
    modules = {
        canonical_name(name): tuple(tensor.shape)
        for name, tensor in DeepseekV4ForCausalLM(config_of(case)).state_dict().items()
        if ".mlp.experts." not in name
    }
    assert modules == {name: shape for name, shape in expected.items() if ".ffn.experts." not in name}


@pytest.mark.parametrize(
    ("found", "canonical", "split"),
    [
        ("layers.0.attn.wq_a.weight", "layers.0.attn.wq_a.weight", ("layers.0.attn.wq_a", "weight")),
        ("model.layers.7.attn.wo_b.scale", "layers.7.attn.wo_b.scale", ("layers.7.attn.wo_b", "scale")),
        ("model.layers.7.self_attn.o_b_proj.weight_scale_inv", "layers.7.attn.wo_b.weight_scale_inv",
         ("layers.7.attn.wo_b", "weight_scale_inv")),
        ("layers.3.ffn.experts.17.w2.weight_scale_2", "layers.3.ffn.experts.17.w2.weight_scale_2",
         ("layers.3.ffn.experts.17.w2", "weight_scale_2")),
        ("model.layers.3.mlp.experts.17.up_proj.weight_packed", "layers.3.ffn.experts.17.w3.weight_packed",
         ("layers.3.ffn.experts.17.w3", "weight_packed")),
        ("model.layers.3.mlp.experts.17.down_proj.input_global_scale", "layers.3.ffn.experts.17.w2.input_global_scale",
         ("layers.3.ffn.experts.17.w2", "input_global_scale")),
        ("model.layers.2.self_attn.compressor.indexer.scorer.weights_proj.weight",
         "layers.2.attn.indexer.weights_proj.weight", ("layers.2.attn.indexer.weights_proj", "weight")),
        ("model.layers.2.self_attn.compressor.gate_proj.weight", "layers.2.attn.compressor.wgate.weight",
         ("layers.2.attn.compressor.wgate", "weight")),
        ("model.layers.2.attn.norm.weight", "layers.2.attn.kv_norm.weight", ("layers.2.attn.kv_norm.weight", "")),
        ("lm_head.weight", "head.weight", ("head", "weight")),
        ("head.weight_scale", "head.weight_scale", ("head", "weight_scale")),
        ("model.embed_tokens.weight", "embed.weight", ("embed.weight", "")),
        ("model.norm.weight", "norm.weight", ("norm.weight", "")),
        ("model.hc_head.hc_fn", "hc_head_fn", ("hc_head_fn", "")),
        ("mtp.0.norm.weight", "mtp.0.norm.weight", ("mtp.0.norm.weight", "")),
        ("model.mtp.0.e_proj.scale", "mtp.0.e_proj.scale", ("mtp.0.e_proj", "scale")),
        ("mtp.2.markov_head.markov_w1.weight", "mtp.2.markov_head.markov_w1.weight",
         ("mtp.2.markov_head.markov_w1.weight", "")),
        ("mtp.2.confidence_head.proj.weight", "mtp.2.confidence_head.proj.weight",
         ("mtp.2.confidence_head.proj", "weight")),
    ],
)  # fmt: skip
def test_names_of_every_kind(found: str, canonical: str, split: tuple[str, str]) -> None:
    assert canonical_name(found) == canonical
    assert split_part(canonical) == split


@pytest.mark.parametrize(
    "name",
    ["layers.0.ffn.gate.bias_vl", "vision.blocks.0.weight", "layers.0.attn.wq_c.weight", "layers.x.attn.wq_a.weight",
     "layers.0.ffn.experts.one.w1.weight", "layers.0.attn.wq_a.zero_point", "embed.scale", "layers.0.head.weight",
     "layers.0.ffn.experts.3.w4.weight", "layers.0.ffn.experts.3.ffn.gate.bias"],
)  # fmt: skip
def test_unknown_names_come_back_unchanged(name: str) -> None:
    """The caller sees that they are not expected; nothing is guessed."""
    assert canonical_name(name) == canonical_name("model." + name) == name
    assert split_part(name) == (name, "")


def test_canonical_names_are_fixed_points() -> None:
    specs = expected_tensors(ModelConfig.from_name("random:tiny"), mtp=True)
    specs |= expected_tensors(release("flash-0731"), mtp=True)
    for key, spec in specs.items():
        assert spec.name == key
        assert canonical_name(spec.weight_name) == spec.weight_name
        assert split_part(spec.weight_name) == ((key, "weight") if spec.role != "param" else (key, ""))


def test_every_alias_is_used_once_per_level() -> None:
    for top in (True, False):
        names = [(name, row.name) for row in ROWS if (row.owner == "top") == top for name in (row.name, *row.aliases)]
        targets: dict[str, set[str]] = {}
        for name, target in names:
            targets.setdefault(name, set()).add(target)
        assert all(len(found) == 1 for found in targets.values()), targets


def test_parts_do_not_hide_a_parameter() -> None:
    """`norm.weight` ends like a part of a linear; no linear may be called like a norm."""
    params = {row.name.rpartition(".")[0] for row in ROWS if row.role == "param" and row.name.endswith(PARTS)}
    linears = {row.name for row in ROWS if row.role != "param"}
    assert not params & linears


# --------------------------------------------------------------------- DeepSeek's published totals, reproduced exactly


@pytest.mark.parametrize(
    ("name", "tensors", "payload_bytes"),
    [
        ("flash", 69_187, 159_609_485_896),
        ("pro", 145_116, 864_704_792_696),
        ("flash-0731", 72_317, 166_878_536_440),
        ("pro-0813", 149_782, 892_727_580_904),
    ],
)
def test_release_has_the_published_number_of_tensors_and_bytes(name: str, tensors: int, payload_bytes: int) -> None:
    specs = expected_tensors(release(name), mtp=True).values()
    assert len(specs) + sum(spec.stored in ("fp4", "fp8") for spec in specs) == tensors  # each has a .scale beside it
    assert sum(format_bytes(spec.shape, spec.stored) for spec in specs) == payload_bytes
    assert sum(count(release(name)).resident["native"].values()) == payload_bytes


PARAMETERS = {
    "flash": {
        "attention": 4_599_057_088, "indexer": 225_727_488, "compressors": 261_443_584, "experts": 277_025_390_592,
        "shared_experts": 1_082_130_432, "router": 45_099_008, "mhc": 33_884_439, "norms": 446_080,
        "embedding": 529_530_880, "lm_head": 529_530_880, "hash_table": 0, "draft": 6_610_048_891,
    },
    "pro": {
        "attention": 18_293_464_704, "indexer": 501_381_120, "compressors": 670_097_408, "experts": 1_547_396_186_112,
        "shared_experts": 4_029_677_568, "router": 167_925_504, "mhc": 84_069_603, "norms": 1_041_664,
        "embedding": 926_679_040, "lm_head": 926_679_040, "hash_table": 0, "draft": 25_840_145_979,
    },
}  # fmt: skip
TOTALS = {  # trunk, trunk + MTP, active per token
    "flash": (284_332_240_471, 290_942_289_362, 13_270_105_687),
    "pro": (1_572_997_201_763, 1_598_837_347_742, 48_852_409_187),
}


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_parameters(name: str) -> None:
    sizes = count(ModelConfig.from_name(f"random:{name}"))
    assert sizes.parameters == PARAMETERS[name]
    assert tuple(sizes.parameters) == COMPONENTS
    assert (sizes.trunk, sizes.trunk + sizes.draft, sizes.active) == TOTALS[name]


def test_draft_stages_of_the_refreshes() -> None:
    assert count(release("flash-0731")).draft == 19_845_850_983
    assert count(release("pro-0813")).draft == 77_498_408_103


LINEARS = {  # parameters of the matrix products one token uses, by component
    "flash": {"attention": 4_599_054_336, "experts": 6_492_782_592, "shared_experts": 1_082_130_432,
              "compressors": 260_046_848, "indexer": 225_705_984, "router": 45_088_768, "lm_head": 529_530_880},
    "pro": {"attention": 18_293_456_896, "experts": 24_178_065_408, "shared_experts": 4_029_677_568,
            "compressors": 667_942_912, "indexer": 501_350_400, "router": 167_903_232, "lm_head": 926_679_040},
}  # fmt: skip


@pytest.mark.parametrize(("name", "total"), [("flash", 13_234_339_840), ("pro", 48_765_075_456)])
def test_linears_used_per_token(name: str, total: int) -> None:
    sizes = count(ModelConfig.from_name(f"random:{name}"))
    assert sizes.active_linears == LINEARS[name]
    assert sum(sizes.active_linears.values()) == total
    read = sizes.read["all_linear_nvfp4"].linears
    assert {part: nbytes * 16 for part, nbytes in read.items()} == {part: n * 9 for part, n in LINEARS[name].items()}


@pytest.mark.parametrize(
    ("name", "linear", "floor", "bf16_head", "native", "resident"),
    [("flash", 7.444, 7.580, 8.341, 11.218, 160.8), ("pro", 27.430, 27.767, 29.099, 39.667, 886.5)],
)
def test_bytes_read_per_token(
    name: str, linear: float, floor: float, bf16_head: float, native: float, resident: float
) -> None:
    sizes = count(ModelConfig.from_name(f"random:{name}"))
    nvfp4 = sizes.read["all_linear_nvfp4"]
    assert round(sum(nvfp4.linears.values()) / 1e9, 3) == linear
    assert round(nvfp4.floor / 1e9, 3) == floor
    assert round(sizes.read["all_linear_nvfp4_bf16_head"].floor / 1e9, 3) == bf16_head
    assert round(sizes.read["native"].total / 1e9, 3) == native
    stored = sizes.resident["all_linear_nvfp4"]
    assert round((sum(stored.values()) - stored["draft"]) / 1e9, 1) == resident


@pytest.mark.parametrize(("name", "linears"), [("flash", 317.7), ("pro", 867.8)])
def test_one_draft_step(name: str, linears: float) -> None:
    assert round(count(ModelConfig.from_name(f"random:{name}")).draft_step_linears / 1e6, 1) == linears


def test_exact_floors() -> None:
    flash, pro = (count(ModelConfig.from_name(f"random:{name}")).read for name in ("flash", "pro"))
    assert flash["all_linear_nvfp4"].floor == 7_444_316_160 + 33_884_439 * 4
    assert pro["all_linear_nvfp4"].floor == 27_430_354_944 + 84_069_603 * 4


@pytest.mark.parametrize(
    ("form", "shape", "nbytes"),
    [
        ("nvfp4", (3, 32), 3 * (16 + 2)),
        ("nvfp4", (3, 40), 3 * (20 + 3)),
        ("fp4", (3, 64), 3 * (32 + 2)),
        ("fp8", (130, 129), 130 * 129 + 2 * 2),
        ("bf16", (5,), 10),
        ("f32", (5, 2), 40),
        ("i64", (5, 2), 80),
    ],
)
def test_format_bytes(form: str, shape: tuple[int, ...], nbytes: int) -> None:
    assert format_bytes(shape, form) == nbytes


def test_policy_nvfp4_leaves_router_and_index_weights_alone() -> None:
    kept = {
        spec.name.split(".", 2)[2]
        for spec in expected_tensors(ModelConfig.from_name("random:tiny")).values()
        if spec.role != "param" and SCHEMES["nvfp4"](spec) != "nvfp4"
    }
    assert kept == {"ffn.gate", "attn.indexer.weights_proj"}


def test_tensor_lists_are_json_friendly() -> None:
    """Names and shapes print as they are; tools depend on it."""
    specs = expected_tensors(ModelConfig.from_name("random:tiny"))
    assert json.loads(json.dumps({name: spec.shape for name, spec in specs.items()}))["head"] == [331, 96]
