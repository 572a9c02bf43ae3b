"""The plan of a decode step with fixed shapes: buffers that one launch fills from positions on the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsv4.errors import CapacityError
from dsv4.kernels.compress.rows import CompressRows
from dsv4.kernels.step_plan.rows import Kind, StepRows
from dsv4.kernels.step_plan.step_plan import step_plan
from dsv4.kvcache.cache import KVCache
from dsv4.kvcache.layout import PAGE_ENTRIES, CompressedKind, entries, pages
from dsv4.kvcache.plan import Plan
from dsv4.kvcache.rows import CompressedRows, WindowRows


class StaticPlan:
    """Buffers of a decode step of B rows on `cache`, for sequences of at most `max_length` tokens.

    tokens, positions, slots [B] i64 are the step's input, on the cache's device: row b appends tokens[b] at
    positions[b] to the sequence in slots[b]; slot -1 is a padding row, which reads and writes nothing, and whose token
    must be one of the vocabulary all the same. `update` fills `plan` and the rotations `token_cis`, `back_cis` [n, B,
    R/2] and `entry_cis` [B, R/2] per kind, all complex64. The buffers stay where they are, so a graph may hold the
    step: the host calls `cache.reserve` before it and `cache.advance` after it.
    """

    @torch.inference_mode(False)  # buffers made here are written to in either mode
    def __init__(
        self,
        cache: KVCache,
        batch: int,
        max_length: int,
        freqs: Tensor,
        places: Mapping[CompressedKind, int],
    ):
        """freqs [n, R/2] f32; places: the row of freqs that each kind of compressed layer turns by."""
        config, device = cache.config, cache.device
        longest = min(cache.max_tokens, config.max_position_embeddings)
        if not 1 <= max_length <= longest or batch < 1:
            raise CapacityError(
                f"a static plan needs batch >= 1 and a max_length of 1..{longest} (what the cache holds of one "
                f"sequence and the model allows); got batch {batch} and max_length {max_length}"
            )
        self.batch, self.max_length = batch, max_length
        self.tokens, self.positions = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
        self.slots = torch.full((batch,), -1, dtype=torch.int64, device=device)
        self._freqs, self._window = freqs, config.sliding_window
        self._tables = [table.on_device for table in cache.tables.values()]
        self._kinds = tuple(_kind(kind, max_length, places[kind], config.index_topk) for kind in cache.tables)
        self.rows = rows = StepRows.empty(batch, self._window, freqs, self._kinds)
        self._out = rows.tensors()
        self.token_cis, self.back_cis = torch.view_as_complex(rows.token_cis), torch.view_as_complex(rows.back_cis)
        named = list(zip(cache.tables, self._kinds, rows.kinds, strict=True))
        self.entry_cis = {name: torch.view_as_complex(made.cis) for name, _, made in named}
        none = torch.empty(0, dtype=torch.int64, device=device)
        every = torch.arange(batch, device=device)
        compressed = {
            name: CompressedRows(
                CompressRows(
                    phase=made.phase,
                    write_rows=every,
                    write_to=made.write_to,
                    from_state=True,
                    history=none,
                    items=made.items,
                    entry_positions=made.entry_positions,
                    entry_to=made.entry_to,
                ),
                made.visible,
                made.pages,
                rows.sequence,
                made.all_rows,
                entries(max_length, kind.ratio),
            )
            for name, kind, made in named
        }
        window = WindowRows(True, none, rows.window_rows, every, rows.window_to)
        spans = [(b, b + 1) for b in range(batch)]
        self.plan = Plan([], self.tokens, self.positions, window, compressed, spans)
        self.update()

    def update(self) -> None:
        """Make the rows and rotations of the step that tokens, positions and slots describe. One launch."""
        step_plan(self.slots, self.positions, self._freqs, self._tables, self._kinds, self._window, out=self._out)


def _kind(kind: CompressedKind, max_length: int, place: int, topk: int) -> Kind:
    """Selected entries are those of CSA once a sequence may have more than `topk`; else every row names all it sees."""
    name, ratio = kind
    most, held = entries(max_length, ratio), max(1, pages(max_length, ratio))
    return Kind(ratio, name == "csa", place, held, 0 if name == "csa" and most > topk else held * PAGE_ENTRIES)
