"""What the certificate needs of a decode step, and of the thing that makes steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

ROOM = 4  # tokens that a placed sequence can still take


class Step(Protocol):
    """The decode step of a batch bucket. In production `run` and `wait` happen per token; `stage` comes before
    the first one and when other sequences take the rows.
    """

    rows: int  # sequences the bucket holds
    graph: torch.cuda.CUDAGraph | None  # after capture(); made with keep_graph=True, so that its nodes can be read

    def stage(self, slots: Sequence[int], tokens: Sequence[int]) -> object:
        """Set the inputs of the next step: len(slots) <= rows sequences with one token each; other rows are padding.
        Positions are those of the cache's lengths, which change no more than its pages: the same stage twice is the
        same step twice.
        """

    def body(self) -> None:
        """All that the graph holds, run eagerly on the current stream: from the inputs to the outputs. It may leave the
        inputs of the step after it, so that bodies follow one another.
        """

    def capture(self) -> None:
        """Capture the body into `graph`. The body has run before."""

    def replay(self) -> None:
        """Launch the graph on the current stream. Waits for nothing."""

    def run(self) -> object:
        """One step of production: the replay, and what tells when it is done."""

    def wait(self) -> object:
        """Until the tokens of the last run are on the host."""

    def outputs(self) -> Mapping[str, Tensor]:
        """Static tensors [rows, ...] that the body writes, such as logits and tokens; padding rows hold anything."""


class Subject(Protocol):
    """Steps, and the memory they work on."""

    def step(self, rows: int) -> Step: ...

    def lengths(self) -> list[int]:
        """Lengths (tokens before the step) at which something changes: edges of windows, entries, pages, top-k."""

    def place(self, lengths: Sequence[int]) -> list[int]:
        """Make the memory hold sequences of these lengths and nothing else, with room for ROOM tokens more each; their
        slots.
        """

    def tokens(self, count: int) -> list[int]:
        """Token ids to step with, the same at each call."""

    def memory(self) -> Mapping[str, Tensor]:
        """What a step leaves for the next one."""

    def unread(self, slots: Sequence[int]) -> Mapping[str, Tensor]:
        """Per name of `memory`, a bool mask over leading dimensions: True where the past of none of `slots` lies."""

    def writes(self, slots: Sequence[int]) -> Mapping[str, Tensor]:
        """Per name of `memory`, a bool mask over leading dimensions: True where one step of `slots` may write."""
