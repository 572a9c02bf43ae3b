"""One decode step on fixed buffers. On a GPU it is one CUDA graph: embed, layers, head, sample, append, advance."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4.engine.sampler import SamplerBuffers
from dsv4.errors import CapacityError, KernelError
from dsv4.kernels.decode_layers.program import Unfit
from dsv4.kvcache import KVCache
from dsv4.layers.persistent import Persistent
from dsv4.model import Model

_STAGES = 8  # staging buffers in turn: a copy from one has long been made when its turn comes again
FASTER_AT_ONCE = 8  # rows up to which all layers in one launch are faster than op by op (docs/measured.md)
_LINES = 4  # steps whose tokens the host may still read


class DecodeStep:
    """A step of `rows` sequences of at most `max_length` tokens on `cache`.

    `stage` says which sequences it is for; after that every `run` appends one token to each and samples the next, which
    stays on the device as the input of the following run: nothing needs to be staged again while the sequences stay.
    Rows without a sequence are padding (slot -1): they read and write nothing. The caller holds room in the cache
    (`cache.reserve`) before and counts (`cache.advance`) after a run.

    sampler: parameters of the rows, `rows` of them or more; greedy when none are given. pool: a handle of torch.cuda's
    graph_pool_handle, for memory shared with other steps' graphs. On a CPU there is no graph and `run` is the body.
    persistent: all layers are one launch (layers/persistent.py); None: on a GPU, where they can be and that is faster.
    Bits are the same.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        rows: int,
        *,
        max_length: int | None = None,
        sampler: SamplerBuffers | None = None,
        pool: Any = None,
        persistent: bool | None = None,
    ):
        longest = min(cache.max_tokens, model.config.max_position_embeddings)
        vocab = model.config.vocab_size
        self.model, self.cache, self.rows, self.device = model, cache, rows, torch.device(model.device)
        self.static, self._step = model.rotaries.static(cache, rows, max_length or longest)
        self.sampler = sampler or SamplerBuffers(rows, vocab, self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self._pool, on_gpu = pool, self.device.type == "cuda"

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=self.device)

        self.layers = self._persistent(persistent)
        self.logits = torch.zeros(rows, vocab, device=self.device)
        self.tokens, self._count = integers(rows), integers(1)
        self._ring = torch.zeros(_LINES, rows, dtype=torch.int64, pin_memory=on_gpu)  # advance writes it
        self._staging = torch.zeros(_STAGES, 3, rows, dtype=torch.int64, pin_memory=on_gpu)
        self._copied = [torch.cuda.Event() for _ in range(_STAGES)] if on_gpu else []
        self._done = torch.cuda.Event() if on_gpu else None
        self._stages = self._runs = 0

    def _persistent(self, wanted: bool | None) -> Persistent | None:
        if wanted is False or (wanted is None and (self.device.type != "cuda" or self.rows > FASTER_AT_ONCE)):
            return None
        try:
            return self.model.at_once(self._step, self.cache)
        except Unfit:
            if wanted:
                raise
            return None

    @torch.inference_mode()
    def stage(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """The next run appends tokens[b] to the sequence in slots[b]; at most `rows` of them."""
        if len(slots) != len(tokens) or not 0 < len(slots) <= self.rows:
            raise CapacityError(
                f"a decode step of {self.rows} rows takes 1 to {self.rows} sequences with a token each; got "
                f"{len(slots)} slots and {len(tokens)} tokens"
            )
        turn = self._stages % _STAGES
        if self._copied and not self._copied[turn].query():
            self._copied[turn].synchronize()
        padding = self.rows - len(slots)
        lengths = [self.cache.length(slot) for slot in slots]
        staged = self._staging[turn]
        staged.copy_(torch.tensor([[*tokens, *[0] * padding], [*lengths, *[0] * padding], [*slots, *[-1] * padding]]))
        for target, source in zip((self.static.tokens, self.static.positions, self.static.slots), staged, strict=True):
            target.copy_(source, non_blocking=True)
        if self._copied:
            self._copied[turn].record()
        self.sampler.upload()
        self._stages += 1

    @torch.inference_mode()
    def body(self) -> None:
        """All that a run does on the device, launched on the current stream."""
        static = self.static
        static.update()
        if self.layers is None:
            last, y = self.model.body_apart(self._step, self.cache)
        else:
            last, y = self.model.body_at_once(self._step, self.layers)
        self.model.head_at_once(last, y, out=self.logits)
        self.sampler.sample(self.logits, out=self.tokens)
        self.sampler.advance(self.tokens, static.slots, static.tokens, static.positions, self._ring, self._count)

    @torch.inference_mode()
    def capture(self) -> None:
        """Make the graph. Rows are padding while it is made: neither the cache nor the samplers' counters move."""
        if self.device.type != "cuda":
            raise KernelError(f"a graph is captured on a CUDA device; this step runs on {self.device}")
        slots = self.static.slots.clone()
        self.static.slots.fill_(-1)
        self.body()  # loads every kernel: in a capture nothing may be loaded
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph, pool=self._pool):
            self.body()
        graph.instantiate()
        self.graph = graph
        self.static.slots.copy_(slots)
        self._count.zero_()
        self._runs = 0

    def replay(self) -> None:
        """Launch the graph on the current stream. Waits for nothing."""
        assert self.graph is not None, "capture() comes before replay()"
        self.graph.replay()

    def run(self) -> None:
        """One step: the graph's launch, or the body where there is none. Waits for nothing on a GPU."""
        if self.graph is None:
            self.body()
        else:
            self.graph.replay()
        if self._done is not None:
            self._done.record()
        self._runs += 1

    def wait(self) -> list[int]:
        """The tokens [rows] that the last run sampled, -1 for a row whose logits were not finite."""
        while self._done is not None and not self._done.query():
            time.sleep(0)
        line: list[int] = self._ring[(self._runs - 1) % _LINES].tolist()
        return line

    def outputs(self) -> Mapping[str, Tensor]:
        """What a run leaves, besides the cache: logits [rows, V] f32 and tokens [rows] i64."""
        return {"logits": self.logits, "tokens": self.tokens}

    @property
    def kernels(self) -> int:
        """Kernel nodes of the graph."""
        from dsv4.engine.guard import census

        assert self.graph is not None, "capture() comes before kernels"
        return sum(node.type == "kernel" for node in census.read(self.graph))
