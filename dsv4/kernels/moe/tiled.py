"""Expert weights in tensor-core order (kernels/tiles.py), gate and up interleaved by eight rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.tiles import NVFP4_BYTES, ROWS, pack_nvfp4, tiles_shape, unpack_nvfp4
from dsv4.quant import nvfp4
from dsv4.quant.weights import MXFP4Weight, NVFP4Weight, Weight

HALF = ROWS // 2  #: rows of gate and of up in a tile: a lane's rows g and g + 8 are a pair
_EXPERTS_AT_ONCE = 8


@dataclass(frozen=True)
class TiledExperts:
    """NVFP4 weights of E experts: tiles u8 [E, R, ceil(K/64), 576], the globals `alpha` [E, P] float32.

    P = 1 projection [R * 16, K], or P = 2 of half as many rows each, eight of the one and eight of the other in a tile.
    """

    tiles: Tensor
    alpha: Tensor
    columns: int

    @property
    def rows(self) -> int:
        """Of all projections together."""
        return self.tiles.shape[1] * ROWS

    @property
    def blocks(self) -> int:
        return self.tiles.shape[2]

    def values(self, expert: int) -> Tensor:
        """float32 [P * N, K] of one expert without its globals, one projection after the other."""
        codes, scale = unpack_nvfp4(self.tiles[expert], self.rows, self.columns)
        rows = nvfp4.dequantize(codes, scale, torch.ones((), device=codes.device))
        projections = self.alpha.shape[1]
        return rows.unflatten(0, (-1, projections, ROWS // projections)).transpose(0, 1).flatten(0, 2)

    def matmul(self, x: Tensor, expert: int, *, half: bool = False) -> Tensor:
        """x [n, K] float32 -> [n, P * N] float32: what the twin multiplies with. half: as in Dense; no effect here."""
        factors = self.alpha[expert].repeat_interleave(self.rows // self.alpha.shape[1])
        return torch.nn.functional.linear(x, self.values(expert)).mul_(factors)


def tiled_experts(**weights: Weight) -> TiledExperts:
    """Pack one projection of all experts, or two of the same shape [E, N, K], by name (for errors)."""
    parts = [_nvfp4(name, weight) for name, weight in weights.items()]
    experts, rows, columns = parts[0].shape
    if any(part.shape != parts[0].shape for part in parts) or rows % (ROWS // len(parts)):
        shapes = {name: list(weight.shape) for name, weight in weights.items()}
        raise KernelError(f"experts {shapes}: expected one shape [E, N, K], N a multiple of {ROWS // len(parts)}")
    shape = experts, *tiles_shape(len(parts) * rows, columns, NVFP4_BYTES)
    tiles = torch.empty(shape, dtype=torch.uint8, device=parts[0].codes.device)
    for first in range(0, experts, _EXPERTS_AT_ONCE):
        some = slice(first, first + _EXPERTS_AT_ONCE)
        codes = _interleaved([part.codes[some] for part in parts])
        scale = _interleaved([part.scale[some].view(torch.uint8) for part in parts])
        tiles[some] = pack_nvfp4(codes, scale.view(torch.float8_e4m3fn))
    alpha = torch.stack([part.global_scale for part in parts], dim=-1)
    return TiledExperts(tiles, alpha, columns)


def _interleaved(parts: list[Tensor]) -> Tensor:
    """[E, N, C] each -> [E, P * N, C]."""
    if len(parts) == 1:
        return parts[0]
    return torch.stack([part.unflatten(1, (-1, HALF)) for part in parts], dim=2).flatten(1, 3)


def _nvfp4(name: str, weight: Weight) -> NVFP4Weight:
    if isinstance(weight, NVFP4Weight):
        return weight
    if isinstance(weight, MXFP4Weight):
        packed, exact = NVFP4Weight.from_mxfp4(weight)
        if exact:
            return packed
        raise KernelError(
            f"experts {name}: the MXFP4 scales of one expert span more than the 17 octaves that NVFP4 holds exactly; "
            "load the model with device='cpu'"
        )
    raise KernelError(
        f"experts {name} are stored as {weight.format}; the GPU multiplies NVFP4 and MXFP4 experts: load the model "
        "with weights='nvfp4', or with device='cpu'"
    )
