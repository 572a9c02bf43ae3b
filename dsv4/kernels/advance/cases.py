"""Cases of advance: idle rows, rows whose logits were not finite, steps that wrap around the ring."""

from collections.abc import Iterator

import torch

from dsv4.kernels.advance.advance import advance
from dsv4.kernels.advance.advance_ref import advance_ref
from dsv4.kernels.case import Case, Maker, bits


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    for rows, vocab in [(1, 9), (3, 4096), (0, 9)] + ([] if quick else [(1, 129280), (64, 129280), (100, 4096)]):
        tokens, slots = make.integers(-1, vocab, rows), make.integers(-1, 8, rows)
        state = [make.integers(0, 1 << 20, rows) for _ in range(3)]
        counts, ring = make.integers(0, 5, rows, vocab).int(), make.integers(0, 99, 4, rows + 3)
        args = (tokens, slots, *state, counts, ring, torch.tensor([6], device=make.device))
        places, name = (2, 3, 4, 5, 6, 7), f"[{rows}] of {vocab}"
        moved = rows * 64
        yield Case(
            "advance", name, "i64", advance, advance_ref, args, bits, in_place=places, returns=False, moved=moved
        )
