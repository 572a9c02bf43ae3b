"""Cases of embed: bits are the contract."""

from collections.abc import Iterator

import torch

from dsv4.kernels.case import DTYPES, FLASH, PRO, Case, Maker, bits, nbytes
from dsv4.kernels.embed.embed import embed
from dsv4.kernels.embed.embed_ref import embed_ref


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    sizes = [(1, 256), (3, 7), (5, 100), (0, 256)]
    sizes += [] if quick else [(1, FLASH), (64, FLASH), (64, PRO), (4096, FLASH)]
    for dtype in DTYPES:
        for rows, width in sizes:
            tokens, table = make.integers(0, 1000, rows), make.normal(1000, width, dtype=dtype)
            tokens[1::3] = -1
            tokens[:1] = 999
            moved = nbytes(tokens) + rows * 5 * width * table.element_size()
            args, name = (tokens, table, 4), f"[{rows}] of [1000, {width}]"
            yield Case("embed", name, dtype, embed, embed_ref, args, bits, moved=moved)
    if make.device.type == "cuda":  # a CPU refuses
        strange = torch.tensor([5, 1000, -2, 2**40], device=make.device)
        yield Case(
            "embed", "ids outside", "bf16", embed, _with_nan, (strange, make.normal(1000, 96, dtype="bf16"), 4), bits
        )


def _with_nan(tokens: torch.Tensor, table: torch.Tensor, streams: int) -> torch.Tensor:
    outside = (tokens < -1) | (tokens >= len(table))
    return embed_ref(tokens.masked_fill(outside, 0), table, streams).masked_fill_(outside[:, None, None], torch.nan)
