"""Cases of gather_columns: one rank that plays all, so what it hears is what it told."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dsv4.kernels.case import Case, Maker, bits
from dsv4.kernels.gather_columns.gather_columns import ROWS, blocks_of, gather_columns, gather_words
from dsv4.kernels.gather_columns.gather_columns_ref import gather_columns_ref
from dsv4.kernels.mhc_seam.peers import Peers

SMALL = [(1, 64, 0, 2), (3, 1025, 1, 2), (8, 100, 2, 4), (0, 64, 0, 2)]  # T, N, rank, ranks
LARGE = [(1, 64640, 0, 2), (5, 64640, 1, 2), (8, 64640, 0, 2), (8, 32320, 3, 4), (2, 16160, 7, 8)]


def echo(rank: int, size: int, columns: int, device: torch.device) -> Peers:
    """What it tells a peer arrives in its own inbox, as what that peer tells it."""
    words = gather_words(size, columns)
    inbox = torch.zeros(words, dtype=torch.int64, device=device)
    addresses = [inbox.data_ptr() + (peer - rank) * (words // 2 // size) * 8 for peer in range(size)]

    def whole(x: Tensor) -> Tensor:
        assert inbox.is_contiguous()  # and lives as long as the peers
        return torch.cat([x] * size, dim=1)

    return Peers.of(rank, addresses, device, whole, turns=ROWS * blocks_of(columns))


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    for rows, columns, rank, size in SMALL if quick else SMALL + LARGE:
        args, among = (make.normal(rows, columns),), {"peers": echo(rank, size, columns, make.device)}
        name = f"[{rows}, {columns}], rank {rank} of {size}"
        yield Case("gather_columns", name, "f32", gather_columns, gather_columns_ref, args, bits, among)
