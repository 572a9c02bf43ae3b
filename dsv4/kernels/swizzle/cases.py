"""Cases of swizzle: whole buffers, views of larger ones, stacks, groups of rows."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dsv4.kernels.case import Case, Maker, bits
from dsv4.kernels.swizzle.swizzle import swizzle, swizzle_grouped
from dsv4.kernels.swizzle.swizzle_ref import swizzle_grouped_ref, swizzle_ref


def scales(make: Maker, *shape: int) -> Tensor:
    return make.integers(0, 127, *shape).to(torch.uint8)


def cases(make: Maker, quick: bool) -> Iterator[Case]:
    whole = {f"[{r}, {c}]": scales(make, r, c) for r, c in [(1, 4), (128, 8), (130, 7), (3, 1), (257, 16), (0, 8)]}
    if not quick:
        whole |= {f"[{r}, {c}]": scales(make, r, c) for r, c in [(64, 256), (4096, 256), (4096, 448), (32768, 64)]}
        whole["[16, 4096, 256]"] = scales(make, 16, 4096, 256)
    whole["[100, 12] of [256, 16]"] = scales(make, 256, 16)[:100, :12]
    whole["[100, 9] of [256, 15]"] = scales(make, 256, 15)[2:102, 3:12]
    whole["[3, 65, 20]"] = scales(make, 3, 65, 20)
    whole["[2, 40, 8] of [2, 128, 8]"] = scales(make, 2, 128, 8)[:, :40]
    for name, scale in whole.items():
        yield Case("swizzle", name, "u8", swizzle, swizzle_ref, (scale,), bits)
    scale = scales(make, 200, 12).view(torch.float8_e4m3fn)
    yield Case("swizzle", "[200, 12] e4m3", "e4m3", swizzle, swizzle_ref, (scale,), bits)
    splits = [[5], [0, 3, 0, 130, 128, 1, 0], [1] * 70, [300, 0, 0]]
    if not quick:
        splits += [make.integers(0, 300, 256).tolist(), make.integers(0, 2, 384).tolist()]
    for split in splits:
        rows = torch.tensor(split, device=make.device)
        args = scales(make, sum(split), 20), rows
        name = f"{len(split)} groups of {sum(split)} rows"
        yield Case("swizzle", name, "u8", swizzle_grouped, swizzle_grouped_ref, args, bits)
