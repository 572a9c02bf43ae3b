"""Cases of gather_columns: one rank that plays all, so what it hears is what it told."""

from collections.abc import Iterator

import torch

from dsv4.kernels.case import Case, Maker, bits
from dsv4.kernels.gather_columns.gather_columns import TURNS, gather_columns, gather_words
from dsv4.kernels.gather_columns.gather_columns_ref import gather_columns_ref
from dsv4.kernels.mhc_seam.cases import played
from dsv4.kernels.mhc_seam.peers import Peers

SMALL = [(1, 64, 0, 2), (3, 1025, 1, 2), (8, 100, 2, 4), (21, 7, 0, 2), (0, 64, 0, 2)]  # T, N, rank, ranks
LARGE = [(1, 64640, 0, 2), (5, 64640, 1, 2), (8, 64640, 0, 2), (8, 32320, 3, 4), (2, 16160, 7, 8), (128, 64640, 1, 2)]


def echo(rank: int, size: int, columns: int, device: torch.device) -> Peers:
    """All ranks give the same columns."""
    words = gather_words(size, columns)
    return played(rank, size, device, words, lambda x: torch.cat([x] * size, dim=1), turns=TURNS)


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    for rows, columns, rank, size in SMALL if quick else SMALL + LARGE:
        args, among = (make.normal(rows, columns),), {"peers": echo(rank, size, columns, make.device)}
        name = f"[{rows}, {columns}], rank {rank} of {size}"
        yield Case("gather_columns", name, "f32", gather_columns, gather_columns_ref, args, bits, among)
