"""The real subject: DecodeStep on a model's KV cache, with a past made up from the bytes of a real one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsv4.config import LayerSpec, ModelConfig
from dsv4.engine.guard.certificate import LONG, SHORT, spread
from dsv4.engine.guard.step import ROOM, Step
from dsv4.engine.params import SamplingParams
from dsv4.engine.step import DecodeStep
from dsv4.kvcache import KVCache
from dsv4.kvcache.layout import PAGE_ENTRIES, entries
from dsv4.model import Model

LIMIT = 16_384  # tokens; no edge of the released models lies beyond
_PROMPT = 1024  # tokens of the real past


def edge_lengths(config: ModelConfig, limit: int = LIMIT) -> list[int]:
    """Tokens before a step, rising, such that the steps lie around every edge of the layout: the window fills, an entry
    completes, a page begins, more entries are visible than top-k takes.
    """
    around = {0, 1, SHORT, LONG}
    edges = {config.sliding_window}
    for spec in config.layers:
        if spec.ratio:
            page = PAGE_ENTRIES * spec.ratio
            edges |= {spec.ratio, page}
            around.add(page + spec.ratio - 1)  # completes the first entry of the second page
        if spec.kind == "csa":
            top = config.index_topk * spec.ratio
            edges.add(top)
            around.add(top + spec.ratio - 1)  # completes the first entry that top-k leaves out
    around |= {edge + i for edge in edges for i in (-2, -1, 0, 1)}
    return sorted(n for n in around if 0 <= n <= min(limit, config.max_position_embeddings - ROOM))


def room_for(lengths: Sequence[int], rows: int) -> int:
    """Tokens before a step of so many rows, whichever of these rising lengths lie side by side; or one and LONG."""
    return max(sum(spread(lengths[::-1], rows)), lengths[-1] + rows * min(LONG, lengths[-1]))


MakeStep = Callable[[Model, KVCache, int, int], Step]


def make_step(model: Model, cache: KVCache, rows: int, longest: int) -> Step:
    """A DecodeStep whose odd rows are sampled and whose even rows are greedy."""
    step = DecodeStep(model, cache, rows, max_length=longest)
    for row in range(1, rows, 2):
        params = SamplingParams(temperature=0.8, top_p=0.9, top_k=50, presence_penalty=0.5)
        step.sampler.set(row, params, seed=row)
    return step


class Decode:
    """A subject of `certify`. One cache for all batch sizes up to `most_rows`, with room for every case; `make`
    (model, cache, rows, longest length) makes the step of a bucket.
    """

    def __init__(self, model: Model, most_rows: int, make: MakeStep = make_step):
        self.model, self._make, self._lengths = model, make, edge_lengths(model.config)
        self.cache = model.new_cache(most_rows, room_for(self._lengths, most_rows) + most_rows * ROOM)
        self._slots: list[int] = []
        self._fill()

    def step(self, rows: int) -> Step:
        return self._make(self.model, self.cache, rows, self._lengths[-1] + ROOM)

    def lengths(self) -> list[int]:
        return self._lengths

    def tokens(self, count: int) -> list[int]:
        generator = torch.Generator().manual_seed(count)
        return torch.randint(self.model.config.vocab_size, (count,), generator=generator).tolist()

    def place(self, lengths: Sequence[int]) -> list[int]:
        for slot in self._slots:
            self.cache.release(slot)
        self._slots = [self.cache.acquire() for _ in lengths]
        wanted = dict(zip(self._slots, lengths, strict=True))
        self.cache.reserve([(slot, n + ROOM) for slot, n in wanted.items()])
        for slot, n in wanted.items():
            self.cache.advance(slot, n)
        return self._slots

    def memory(self) -> dict[str, Tensor]:
        return {f"layers.{i}.{name}": x for i, layer in enumerate(self.cache.layers) for name, x in vars(layer).items()}

    def unread(self, slots: Sequence[int]) -> dict[str, Tensor]:
        return self._masks(lambda spec, name, x: ~past_rows(self.cache, slots, spec, name, x))

    def writes(self, slots: Sequence[int]) -> dict[str, Tensor]:
        return self._masks(lambda spec, name, x: next_rows(self.cache, slots, spec, name, x))

    def _masks(self, rows: Callable[[LayerSpec, str, Tensor], Tensor]) -> dict[str, Tensor]:
        """One mask per kind of layer and buffer: page numbers are the same for all layers of a kind."""
        masks: dict[tuple[LayerSpec, str], Tensor] = {}
        result = {}
        for i, (spec, layer) in enumerate(zip(self.model.config.layers, self.cache.layers, strict=True)):
            for name, x in vars(layer).items():
                if (spec, name) not in masks:
                    masks[spec, name] = rows(spec, name, x).to(x.device)
                result[f"layers.{i}.{name}"] = masks[spec, name]
        return result

    def _fill(self) -> None:
        """Give every row of every buffer the bytes of some row that a real prefill wrote: a past of any length is then
        there at once, with valid codes and scales. Neighbours get different rows.
        """
        config = self.model.config
        past = self.model.new_cache(1, _PROMPT)
        ids = torch.tensor(self.tokens(min(_PROMPT, config.max_position_embeddings)))
        self.model.forward([(past.acquire(), ids)], past)
        for layer, source in zip(self.cache.layers, past.layers, strict=True):
            for name, x in vars(layer).items():
                tile(x, getattr(source, name))


def past_rows(cache: KVCache, slots: Sequence[int], spec: LayerSpec, name: str, x: Tensor) -> Tensor:
    """[S, n] or [P, 64] bool: rows of a layer's buffer that hold the slots' pasts. Rings and states keep the last n
    tokens at token % n, pools entry e in the sequence's page e // 64.
    """
    mask = torch.zeros(x.shape[:2], dtype=torch.bool)
    for slot in slots:
        length = cache.length(slot)
        if name.endswith("pool"):
            _mark(mask, cache, slot, spec, torch.arange(entries(length, spec.ratio)))
        else:
            mask[slot, torch.arange(max(0, length - x.shape[1]), length) % x.shape[1]] = True
    return mask


def next_rows(cache: KVCache, slots: Sequence[int], spec: LayerSpec, name: str, x: Tensor) -> Tensor:
    """[S, n] or [P, 64] bool: the rows that the slots' next tokens are written to."""
    mask = torch.zeros(x.shape[:2], dtype=torch.bool)
    for slot in slots:
        length = cache.length(slot)
        if name.endswith("pool"):
            done = entries(length, spec.ratio), entries(length + 1, spec.ratio)
            _mark(mask, cache, slot, spec, torch.arange(*done))
        else:
            mask[slot, length % x.shape[1]] = True
    return mask


def _mark(mask: Tensor, cache: KVCache, slot: int, spec: LayerSpec, entry: Tensor) -> None:
    held = torch.tensor(cache.tables[spec.kind, spec.ratio].held[slot], dtype=torch.int64)
    mask[held[entry // PAGE_ENTRIES], entry % PAGE_ENTRIES] = True


def tile(x: Tensor, source: Tensor) -> None:
    """Fill x [A, B, N] with those rows of source [C, D, N] that were written, again and again."""
    rows = source.flatten(0, 1)
    rows = rows[(rows != 0).any(-1)]
    count = x.shape[0] * x.shape[1]
    if len(rows):
        order = torch.arange(count, device=x.device)
        x.flatten(0, 1).copy_(rows[(order + order // len(rows)) % len(rows)])
