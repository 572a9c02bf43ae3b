"""A step whose layers are one launch against the chain of launches, bit for bit: streams, logits, tokens, cache."""

from dataclasses import replace

import pytest
import torch

import dsv4
from dsv4.engine.step import DecodeStep

STEPS = 20
LENGTHS = [9, 127, 300, 3, 511, 64, 130, 33]


@pytest.fixture(scope="module")
def model() -> dsv4.model.Model:
    return dsv4.load("nano", device="cuda")


def walked(
    model, rows: int, live: int, longest: int, *, persistent: bool, graph: bool, held: int = 0
) -> list[torch.Tensor]:
    """What each of the steps leaves, then the cache; rows beyond `live` are padding. held: tokens of a sequence that
    the cache has room for, if more than `longest`.
    """
    cache = model.new_cache(live, live * max(longest, held))
    slots = [cache.acquire() for _ in range(live)]
    generator = torch.Generator().manual_seed(rows)
    for slot, length in zip(slots, LENGTHS, strict=False):
        ids = torch.randint(model.config.vocab_size, (min(length, longest - STEPS - 1),), generator=generator)
        model.forward([(slot, ids)], cache)
    step = DecodeStep(model, cache, rows, max_length=longest, persistent=persistent)
    if graph:
        step.capture()
    step.stage(slots, [7 + slot for slot in slots])
    found = []
    for _ in range(STEPS):
        cache.reserve([(slot, 1) for slot in slots])
        step.run()
        step.wait()
        for slot in slots:
            cache.advance(slot, 1)
        found += [step.logits[:live].clone(), step.tokens[:live].clone()]
        if step.layers is not None:
            assert torch.isfinite(step.layers.program.y.float()).all()
    return [*found, *(x for layer in cache.layers for x in vars(layer).values())]


@pytest.mark.parametrize("longest", [1024, 200], ids=["selected", "all taken"])
@pytest.mark.parametrize(("rows", "live"), [(1, 1), (2, 2), (4, 3), (5, 3), (8, 8)])
def test_one_launch_is_the_chain(model, rows, live, longest):
    chain = walked(model, rows, live, longest, persistent=False, graph=False)
    for graph in (False, True):
        found = walked(model, rows, live, longest, persistent=True, graph=graph)
        for place, (a, b) in enumerate(zip(chain, found, strict=True)):
            assert torch.equal(a, b), f"result {place} of {len(chain)}, graph: {graph}"


@pytest.mark.parametrize(("rows", "live"), [(1, 1), (4, 3), (8, 8)])
def test_one_launch_is_the_chain_planned_for_long_rows(model, monkeypatch, rows, live):
    monkeypatch.setattr(model, "config", replace(model.config, max_position_embeddings=1 << 16))
    chain = walked(model, rows, live, 40000, persistent=False, graph=False)
    for longest in (40000, 1024):  # a step for short sequences leaves the same
        found = walked(model, rows, live, longest, persistent=True, graph=True, held=40000)
        for place, (a, b) in enumerate(zip(chain, found, strict=True)):
            assert torch.equal(a, b), f"result {place} of {len(chain)}, made for {longest}"


@pytest.mark.parametrize("rows", [1, 4])
def test_streams_are_those_of_the_chain(model, rows):
    cache = model.new_cache(rows, 64 * rows)
    slots = [cache.acquire() for _ in range(rows)]
    cache.reserve([(slot, 8) for slot in slots])
    step = DecodeStep(model, cache, rows, max_length=64, persistent=True)
    step.stage(slots, list(range(3, 3 + rows)))
    assert step.layers is not None
    with torch.inference_mode():
        step.static.update()
        chain = model.body(step._step, cache)
        last, y = model.body_at_once(step._step, step.layers)
        streams, x = model.stream_head.leave(y, last)
        assert torch.equal(chain, streams) and torch.equal(model.stream_head(chain), x)


def test_a_step_is_few_kernels(model):
    cache = model.new_cache(1, 256)
    step = DecodeStep(model, cache, 1, max_length=256)
    step.capture()
    assert step.kernels < 16
