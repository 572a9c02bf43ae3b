"""Made-up weights of the real shapes: their statistics, that they repeat, what they weigh, and what is refused."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpoint_files import SMALL
from cli_helpers import Program
from torch import Tensor

import dsv4.checkpoint.load as load_module
from dsv4 import load
from dsv4.checkpoint import synthetic
from dsv4.checkpoint.load import load_model_weights
from dsv4.checkpoint.names import expected_tensors
from dsv4.checkpoint.plan import stack_name
from dsv4.checkpoint.random import gain
from dsv4.checkpoint.sizes import count
from dsv4.checkpoint.summary import summarize
from dsv4.checkpoint.synthetic import form_of, free_bytes, shortened, synthesize, synthetic_bytes
from dsv4.config import ModelConfig
from dsv4.errors import CapacityError, ConfigError
from dsv4.layers.settings import Settings
from dsv4.model import Model
from dsv4.quant.weights import NVFP4Weight, Weight

TINY = ModelConfig.from_name("random:tiny")
# Wide enough for statistics, one layer of each kind and one that hashes.
MIDDLE = dataclasses.replace(
    TINY, hidden_size=512, moe_intermediate_size=256, q_lora_rank=256, head_dim=128, index_head_dim=128, vocab_size=1024
)


def made(config: ModelConfig, policy: Any, **how: Any) -> dict[str, Weight | Tensor]:
    return dict(synthesize(config, policy, **how))


def stored(value: Weight | Tensor) -> list[Tensor]:
    return list(value.tensors().values()) if isinstance(value, Weight) else [value]


@pytest.fixture
def dsv4(capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(capsys)


@pytest.mark.parametrize("policy", ["native", "nvfp4"])
def test_values_have_the_deviation_of_their_gain_and_no_mean(policy: str) -> None:
    for key, weight in made(MIDDLE, policy, mtp=True).items():
        if not isinstance(weight, Weight):
            continue
        values = weight.dequantize(torch.float64)
        expected = gain(key) / math.sqrt(values.shape[-1])
        blocks = values.numel() / (16384 if weight.format == "fp8" else 16)  # scales drawn one by one
        allowed = (0.05 if weight.format == "nvfp4" else 0.01) + 2 / math.sqrt(blocks)
        assert abs(float(values.std()) / expected - 1) < allowed, (key, weight.format)
        assert abs(float(values.mean())) < 5 * expected / math.sqrt(values.numel()), key
        assert torch.isfinite(values).all()


def test_every_code_and_every_sign_occurs_and_rows_differ() -> None:
    weight = made(MIDDLE, "nvfp4")["layers.1.ffn.experts.w2"]
    assert isinstance(weight, NVFP4Weight)
    counts = torch.bincount(torch.cat([weight.codes & 15, weight.codes >> 4]).flatten().long(), minlength=16)
    assert (counts.double() / counts.sum() - 1 / 16).abs().max() < 0.002
    assert len(weight.scale.view(torch.uint8).unique()) == 16
    first, second = weight.codes[0].flatten(), weight.codes[1].flatten()
    assert 0.001 < float((first == second).double().mean()) < 0.01  # 1/256 by chance


def test_the_same_seed_and_name_give_the_same_bytes() -> None:
    first, again, other = made(TINY, "native"), made(TINY, "native"), made(TINY, "native", seed=1)
    short = made(shortened(TINY, 2), "native")
    for key, value in first.items():
        assert all(torch.equal(a, b) for a, b in zip(stored(value), stored(again[key]), strict=True)), key
        assert not all(torch.equal(a, b) for a, b in zip(stored(value), stored(other[key]), strict=True)), key
        if key in short:
            assert all(torch.equal(a, b) for a, b in zip(stored(value), stored(short[key]), strict=True)), key
    one, two = (first[f"layers.{i}.ffn.shared_experts.w1"] for i in (0, 1))
    assert not torch.equal(one.dequantize(), two.dequantize())


@pytest.mark.parametrize("policy", ["native", "nvfp4"])
def test_names_shapes_and_bytes_are_those_of_the_plan(policy: Any) -> None:
    for config in (TINY, ModelConfig.from_dict(SMALL)):
        weights = made(config, policy, mtp=True)
        specs = {stack_name(name): spec for name, spec in expected_tensors(config, mtp=True).items()}
        assert weights.keys() == specs.keys()
        for key, value in weights.items():
            assert tuple(value.shape)[-len(specs[key].shape) :] == specs[key].shape, key
            form = form_of(specs[key], policy)
            assert not isinstance(value, Weight) or value.format == {"fp4": "mxfp4"}.get(form, form)
        total = sum(value.nbytes for value in weights.values())
        assert total == sum(synthetic_bytes(config, policy, mtp=True).values())
        pair = [weights[f"layers.0.ffn.experts.{name}"] for name in ("w1", "w3")]
        assert torch.equal(*[w.global_scale for w in pair if isinstance(w, NVFP4Weight)])  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "layers"), [("random:flash", 8), ("random:pro", 4), ("random:flash", None)])
def test_bytes_of_real_sizes_are_those_that_inspect_prints(name: str, layers: int | None) -> None:
    config = shortened(ModelConfig.from_name(name), layers)
    document = summarize(name, layers)
    resident = document["resident_bytes"]["nvfp4"]["trunk_bytes"]
    blocks = synthetic_bytes(config, "nvfp4")
    assert 0 <= sum(blocks.values()) - resident < 1e-5 * resident  # four bytes of a global per matrix
    assert document["config"]["num_hidden_layers"] == len(config.layers) == len(blocks) - 1
    assert document["parameters"]["trunk_params"] == count(config).trunk
    if name == "random:flash":
        assert all(abs(size / 3.71e9 - 1) < 0.02 for block, size in blocks.items() if block)


def test_the_first_layers_of_the_schedule_are_kept() -> None:
    flash = ModelConfig.from_name("random:flash")
    short = shortened(flash, 4)
    assert [layer.kind for layer in short.layers] == ["window", "window", "csa", "hca"]
    assert [layer.hash for layer in short.layers] == [True, True, True, False]
    assert dataclasses.replace(short, layers=flash.layers, num_hidden_layers=43) == flash == shortened(flash, None)
    assert hash(short) != hash(flash)
    for wrong in (0, -1, 44):
        with pytest.raises(ConfigError, match=f"layers = {wrong}: this model has 43 layers"):
            shortened(flash, wrong)


@pytest.mark.parametrize("policy", ["native", "nvfp4"])
@pytest.mark.parametrize("act", ["bf16", "nvfp4"])
def test_a_deep_model_stays_finite_and_alive(policy: Any, act: str) -> None:
    """43 layers: the streams neither vanish nor grow without bound, and logits tell tokens apart."""
    deep = dataclasses.replace(TINY, num_hidden_layers=43, layers=(*TINY.layers[:2], *TINY.layers[2:4] * 21)[:43])
    assert len(deep.layers) == 43
    norms: list[float] = []
    model = Model(deep, made(deep, policy), Settings.parse(deep, "bfloat16", act, True, True))
    cache = model.new_cache(1, 64)
    ids = torch.randint(0, deep.vocab_size, (40,), generator=torch.Generator().manual_seed(0))
    logits = model.forward(
        [(cache.acquire(), ids)], cache, all_logits=True, observe=lambda _, x: norms.append(float(x.float().std()))
    )
    assert torch.isfinite(logits).all() and float(logits.std()) > 0.5
    assert float(torch.nn.functional.cosine_similarity(logits[5], logits[30], dim=0)) < 0.9
    assert all(0.1 < norm < 100 for norm in norms[:-1])
    assert len(set(logits.argmax(-1).tolist())) > 10


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    return lambda free: monkeypatch.setattr(synthetic, "free_bytes", lambda device: int(free))


def test_weights_that_do_not_fit_are_refused_with_the_layers_that_would(room: Callable[[float], None]) -> None:
    room(141e9)
    with pytest.raises(CapacityError, match=r"random:flash with 43 layers.*160\.\d GB.*133\.\d GB.*--layers 35\)"):
        load_model_weights("random:flash", policy="nvfp4")
    with pytest.raises(CapacityError, match=r"random:pro with 8 layers and weights='native'.*layers=\d+ fits"):
        room(60e9)
        load_model_weights("random:pro", layers=8)
    room(2e9)
    with pytest.raises(CapacityError, match="not even one layer fits"):
        load("random:flash", layers=2)


def test_the_layers_that_are_said_to_fit_do(room: Callable[[float], None]) -> None:
    config = ModelConfig.from_name("random:flash")
    room(100e9)
    with pytest.raises(CapacityError) as caught:
        synthetic.check_capacity("x", config, "nvfp4", torch.device("cpu"))
    fitting = int(str(caught.value).split("layers=")[-1].split()[0])
    synthetic.check_capacity("x", shortened(config, fitting), "nvfp4", torch.device("cpu"))
    with pytest.raises(CapacityError):
        synthetic.check_capacity("x", shortened(config, fitting + 1), "nvfp4", torch.device("cpu"))


def test_this_machine_has_memory() -> None:
    assert free_bytes(torch.device("cpu")) > 1e8


def test_the_loader_makes_them_and_keeps_the_first_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "SYNTHETIC", ("random:tiny",))
    config, weights, folder = load_model_weights("random:tiny", layers=3, policy="nvfp4")
    assert len(config.layers) == 3 and folder is None
    assert {key.split(".")[1] for key in weights if key.startswith("layers.")} == {"0", "1", "2"}
    model = load("random:tiny", layers=4)
    assert len(model.blocks) == 4 and torch.isfinite(model.logits(list(range(30)))).all()


def test_only_made_up_models_can_be_shortened(dsv4: Program) -> None:
    with pytest.raises(ConfigError, match="layers = 2 shortens random:flash and random:pro; nano is loaded whole"):
        load("nano", layers=2)
    done = dsv4("inspect", "nano", "--layers", 2)
    assert done.code == 1 and "nano is described whole" in done.err
    done = dsv4("generate", "random:flash", "--layers", 44, "-p", "a")
    assert done.code == 1 and "error: layers = 44: this model has 43 layers" in done.err
    done = dsv4("inspect", "random:flash", "--layers", 4)
    assert done.code == 0 and "2 window, 1 CSA, 1 HCA; 3 hash-routed" in done.out
