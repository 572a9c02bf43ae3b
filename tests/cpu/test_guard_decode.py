"""The guard's view of a real cache, on the CPU: edges, made-up pasts, and which rows a step reads and writes."""

import pytest
import torch

from dsv4.config import ModelConfig
from dsv4.engine.guard import bits
from dsv4.engine.guard.decode import Decode, edge_lengths, make_step, room_for, tile
from dsv4.engine.step import DecodeStep
from dsv4.model import load


class ForwardStep:
    """A decode step made of Model.forward: what DecodeStep does, without a graph."""

    def __init__(self, model, cache, rows, longest=None):
        self.model, self.cache, self.rows, self.graph = model, cache, rows, None
        self.logits = torch.zeros(rows, model.config.vocab_size)

    def stage(self, slots, tokens):
        self.batch = [(slot, torch.tensor([token])) for slot, token in zip(slots, tokens, strict=True)]

    def body(self):
        self.logits[: len(self.batch)] = self.model.forward(self.batch, self.cache)
        for slot, _ in self.batch:
            self.cache.advance(slot, -1)  # the same stage twice is the same step twice

    def capture(self):
        pass

    def replay(self):
        self.body()

    def outputs(self):
        return {"logits": self.logits}


class Forgetful(ForwardStep):
    """Takes the first row of the first ring with it, whoever it belongs to."""

    def body(self):
        super().body()
        self.logits += self.cache.layers[0].ring[-1, -1].float().sum() * 1e-3


def test_edges_of_flash():
    config = ModelConfig.from_name("random:flash")
    lengths = edge_lengths(config)
    assert {0, 1, 2, 3, 4, 5, 126, 127, 128, 129, 254, 255, 256, 257, 259, 300} <= set(lengths)
    top, page = config.index_topk * 4, 64 * 128
    assert {top - 1, top, top + 3, page - 1, page, page + 127} <= set(lengths) and lengths == sorted(lengths)
    assert max(edge_lengths(config, limit=200)) < 200


@pytest.mark.parametrize("name", ["random:flash", "random:pro"])
def test_there_is_room_for_whichever_lengths_lie_side_by_side(name):
    lengths = edge_lengths(ModelConfig.from_name(name))
    for rows in range(1, 70):
        sums = [sum((lengths * rows)[start : start + rows]) for start in range(len(lengths))]
        assert max(sums) <= room_for(lengths, rows)


@pytest.fixture(scope="module")
def nano():
    return load("nano")


@pytest.fixture(scope="module")
def subject(nano):
    return Decode(nano, 4, ForwardStep)


def test_the_past_is_made_of_real_rows(subject):
    for name, x in subject.memory().items():
        assert bool((x != 0).any(-1).all()), f"{name} has rows that hold nothing"
    x, source = torch.zeros(3, 4, 2), torch.zeros(1, 5, 2)
    source[0, 1:4] = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    tile(x, source)
    assert set(x.flatten().tolist()) == {1.0, 2.0, 3.0}


def test_sequences_are_placed_with_room_for_one_token(subject):
    for lengths in ([5, 300, 1, 0], [subject.lengths()[-1]] * 2, subject.lengths()[:4]):
        slots = subject.place(lengths)
        assert [subject.cache.length(slot) for slot in slots] == list(lengths) and len(set(slots)) == len(slots)
    assert subject.tokens(3) == subject.tokens(3)


def findings(subject, lengths, live, make=None):
    step = (make or ForwardStep)(subject.model, subject.cache, len(lengths))
    slots, tokens = subject.place(lengths), subject.tokens(len(lengths))
    found = bits.compare(step, subject, slots, tokens, "all")
    return found + bits.poisoned(step, subject, slots[:live], tokens[:live], "some")


def test_the_model_reads_its_past_and_writes_its_next_rows_only(subject):
    """So the masks are right: were a row missing from the past, poison would reach the logits."""
    lengths = subject.lengths()
    for start in range(0, len(lengths), 4):
        assert findings(subject, (lengths + lengths)[start : start + 4], 2) == []


class BodyStep(DecodeStep):
    """The real step where there are no graphs."""

    def replay(self):
        self.body()


def body_step(model, cache, rows, longest):
    return BodyStep(model, cache, rows, max_length=longest)


def test_the_real_step_repeats_itself_and_minds_its_rows(nano):
    real = Decode(nano, 4, body_step)
    lengths = real.lengths()
    step = real.step(4)
    for start in range(0, len(lengths), 4):
        chosen = (lengths + lengths)[start : start + 4]
        slots, tokens = real.place(chosen), real.tokens(4)
        assert bits.compare(step, real, slots, tokens, "all live") == []
        for live in (1, 3):
            assert bits.poisoned(step, real, slots[:live], tokens[:live], "padded") == []


def test_the_steps_own_buffers_are_found(nano):
    step = make_step(nano, nano.new_cache(2, 512), 2, 512)
    own = bits.own_tensors(step)
    assert {"logits", "tokens", "static.positions", "static.slots", "static.tokens", "sampler.counts"} <= own.keys()
    assert not any(name.startswith(("model", "cache")) for name in own)


def test_a_step_that_reads_a_free_row_is_found(subject):
    found = findings(subject, [5, 6, 7, 8], 2, Forgetful)
    assert any("poisoned" in finding.what for finding in found)


def test_a_past_row_left_out_of_the_mask_is_noticed(subject, monkeypatch):
    """The other way round: poison where a sequence's past lies does reach the logits."""
    slots = subject.place([300, 300, 300, 300])
    whole = {name: torch.ones(x.shape[:2], dtype=torch.bool) for name, x in subject.memory().items()}
    monkeypatch.setattr(subject, "unread", lambda slots: whole)
    step = ForwardStep(subject.model, subject.cache, 4)
    assert bits.poisoned(step, subject, slots, subject.tokens(4), "all poisoned")


def test_a_packed_cache_has_the_same_rows(nano, monkeypatch):
    new_cache = nano.new_cache
    monkeypatch.setattr(nano, "new_cache", lambda *sizes: new_cache(*sizes, packed=True))
    packed = Decode(nano, 2, ForwardStep)
    assert packed.memory()["layers.0.ring"].dtype == torch.uint8
    for lengths in ([5, 300], [127, 128]):
        assert findings(packed, lengths, 1) == []
