"""A decode step whose layers are one op says, bit for bit, what the chain of ops says."""

import pytest
import torch

from dsv4.engine.step import DecodeStep
from dsv4.errors import KernelError
from dsv4.model import load


@pytest.fixture(scope="module", params=["random:tiny", "nano"])
def model(request):
    return load(request.param)


def walked(model, persistent, rows, lengths, longest):
    """Logits, tokens and the cache after each of some steps; rows beyond `lengths` are padding."""
    cache = model.new_cache(len(lengths), 512)
    slots = [cache.acquire() for _ in lengths]
    generator = torch.Generator().manual_seed(rows)
    for slot, length in zip(slots, lengths, strict=True):
        ids = torch.randint(model.config.vocab_size, (length,), generator=generator)
        model.forward([(slot, ids)], cache)
    step = DecodeStep(model, cache, rows, max_length=longest, persistent=persistent)
    assert (step.layers is not None) == persistent
    step.stage(slots, [7 + slot for slot in slots])
    found = []
    for _ in range(6):
        cache.reserve([(slot, 1) for slot in slots])
        step.run()
        for slot in slots:
            cache.advance(slot, 1)
        found += [step.logits.clone(), step.tokens.clone()]
    return [*found, *(x for layer in cache.layers for x in vars(layer).values())]


@pytest.mark.parametrize(("rows", "lengths"), [(1, [9]), (2, [130, 3]), (3, [30, 61])])
@pytest.mark.parametrize("longest", [300, 20], ids=["selected", "all taken"])
def test_a_program_is_the_chain(model, rows, lengths, longest):
    longest = max(longest, max(lengths) + 8)
    chain, program = (walked(model, how, rows, lengths, longest) for how in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(chain, program, strict=True))
    assert len({tuple(x.tolist()) for x in chain[1:12:2]}) > 1  # the steps do differ


def test_what_cannot_be_a_program_is_said():
    for how, rows, why in (
        ({"dtype": "float32"}, 1, "torch.float32"),
        ({"act": "nvfp4"}, 1, "act 'nvfp4'"),
        ({}, 9, "9 rows; a program takes 1 to 8"),
    ):
        model = load("random:tiny", **how)
        cache = model.new_cache(rows, 64 * rows)
        with pytest.raises(KernelError, match=why):
            DecodeStep(model, cache, rows, persistent=True)
        assert DecodeStep(model, cache, rows).layers is None
