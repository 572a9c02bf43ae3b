"""The model's own behaviour: settings, arguments, isolation of sequences, reuse of slots, observation."""

import pytest
import torch

import dsv4
from dsv4.errors import CapacityError, ConfigError, Dsv4Error, KernelError, RequestError
from dsv4.kernels.op import REGISTRY, op


@pytest.fixture(scope="module")
def model():
    return dsv4.load("random:tiny", dtype="float32", kv_quant=False, index_quant=False)


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 331, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype 'float16' is not supported; choose one of bfloat16, float32"),
        ({"act": "int8"}, "act 'int8' is not supported; choose one of bf16, fp8, nvfp4"),
    ],
)
def test_bad_settings_name_the_choices(options, message):
    with pytest.raises(ConfigError, match=message):
        dsv4.load("random:tiny", **options)


def test_bad_policy_is_refused():
    with pytest.raises(Dsv4Error, match="int4"):
        dsv4.load("random:tiny", weights="int4")


@pytest.mark.parametrize("arguments", [{"prefill": 9}, {"prefill": -1}, {"chunk": 0}])
def test_bad_logits_arguments(model, arguments):
    with pytest.raises(RequestError, match="logits wants"):
        model.logits(tokens(8), **arguments)


def test_no_tokens_are_refused(model):
    with pytest.raises(RequestError, match="logits wants"):
        model.logits([])


def test_logits_are_float32_and_finite(model):
    logits = model.logits(tokens(100))
    assert logits.shape == (100, 331) and logits.dtype == torch.float32 and logits.isfinite().all()


def test_a_poisoned_neighbour_changes_nothing(model):
    """NaN in everything another slot and the free pages hold must not reach a sequence, not even multiplied by 0."""
    alone = model.logits(tokens(150))
    cache = model.new_cache(2, 400)
    other, slot = cache.acquire(), cache.acquire()
    for layer in cache.layers:
        for name in ("ring", "state", "pool", "index_state", "index_pool"):
            if hasattr(layer, name):
                getattr(layer, name).fill_(float("nan"))
    with pytest.raises(CapacityError):
        cache.reserve([(other, 500)])
    parts = [*tokens(150)[:9].split(1), tokens(150)[9:70], *tokens(150)[70:].split(1)]  # decode from the first token on
    got = torch.cat([model.forward([(slot, part)], cache, all_logits=True) for part in parts])
    assert (got - alone).abs().max() < 2e-5 * alone.abs().max()


def test_a_reused_slot_remembers_nothing(model):
    cache = model.new_cache(1, 400)
    slot = cache.acquire()
    model.forward([(slot, tokens(200, seed=1))], cache)
    cache.release(slot)
    slot = cache.acquire()
    again = model.forward([(slot, tokens(60))], cache, all_logits=True)
    assert torch.equal(again, model.logits(tokens(60)))


def test_a_refused_step_leaves_the_sequence_as_it_was(model):
    cache = model.new_cache(1, 20)
    slot = cache.acquire()
    model.forward([(slot, tokens(15))], cache)
    with pytest.raises(CapacityError, match="6 tokens do not fit"):
        model.forward([(slot, tokens(6))], cache)
    assert cache.length(slot) == 15
    after = model.forward([(slot, tokens(20)[15:])], cache, all_logits=True)
    assert (after - model.logits(tokens(20))[15:]).abs().max() < 1e-4


def test_observers_see_every_layer(model):
    seen: dict[str, tuple[int, ...]] = {}
    cache = model.new_cache(1, 10)
    model.forward([(cache.acquire(), tokens(10))], cache, observe=lambda name, x: seen.update({name: tuple(x.shape)}))
    expected = [f"layers.{i}.{part}" for i in range(model.config.num_hidden_layers) for part in ("attn", "ffn")]
    assert list(seen) == [*expected, "logits"]
    assert seen["layers.0.attn"] == (10, 4, 96) and seen["logits"] == (1, 331)


def test_quantisations_that_the_sizes_do_not_allow_are_refused():
    from dataclasses import replace

    from dsv4.config import ModelConfig
    from dsv4.layers.settings import Settings

    config = ModelConfig.from_name("random:tiny")
    with pytest.raises(ConfigError, match="head_dim - qk_rope_head_dim = 84 is not a multiple of 64"):
        Settings.parse(replace(config, head_dim=100), "float32", "bf16", True, False)
    with pytest.raises(ConfigError, match="power of two and a multiple of 32, got 48"):
        Settings.parse(replace(config, index_head_dim=48), "float32", "bf16", False, True)


def test_an_op_names_what_is_wrong_and_where():
    def double(x):
        return 2 * x

    @op("double_for_test", ref=double, shapes={"x": "T 4 : f32"})
    def double_for_test(x):
        raise AssertionError("the CPU runs the twin")

    try:
        assert torch.equal(double_for_test(torch.ones(2, 4)), torch.full((2, 4), 2.0))
        for bad, message in [
            (torch.ones(2, 5), "'x' has 4 = 5 where 4 = 4 was expected"),
            (torch.ones(4), r"'x' must have shape \[T 4\], got \[4\]"),
            (torch.ones(2, 4, dtype=torch.float64), "'x' has dtype torch.float64, expected one of torch.float32"),
        ]:
            with pytest.raises(KernelError, match=message):
                double_for_test(bad)
    finally:
        del REGISTRY["double_for_test"]


@pytest.mark.parametrize("device", ["no such device", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_before_loading(device):
    with pytest.raises(ConfigError, match="cannot be used here"):
        dsv4.load("random:tiny", device=device)
