"""Which part of a weight a rank holds. Which dimension is divided is said by `split` in checkpoint/names.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.quant import fp8, mxfp4, nvfp4
from dsv4.quant.weights import Weight

_COLUMN_GROUPS = {"nvfp4": nvfp4.GROUP, "fp4": mxfp4.GROUP, "mxfp4": mxfp4.GROUP}


@dataclass(frozen=True)
class Share:
    """Rank `rank` of `size` takes the part of that number when a dimension is divided evenly. The default is all.

    by_expert: routed experts are divided by their number, so that a rank has a part of them whole; else each is divided
    by its inner width.
    """

    rank: int = 0
    size: int = 1
    by_expert: bool = False

    def cut(self, split: str, shape: tuple[int, ...]) -> Cut | None:
        """What this rank holds of a matrix or vector of `shape`; None for all of it (`split` is then empty)."""
        if not split or self.size == 1:
            return None
        dim = -1 if split == "columns" else -len(shape)
        part = shape[dim] // self.size
        return Cut(dim, self.rank * part, (self.rank + 1) * part, shape[dim])

    def experts(self, count: int) -> range:
        """Which of `count` routed experts this rank holds, whole or a part of each."""
        part = count // self.size
        return range(self.rank * part, (self.rank + 1) * part) if self.by_expert else range(count)


@dataclass(frozen=True)
class Cut:
    """Entries start..stop (exclusive) of dimension `dim`, which has `whole` of them. dim counts from the end: -1 are
    the columns of a matrix, -2 its rows, so that stacks of matrices are cut alike.
    """

    dim: int
    start: int
    stop: int
    whole: int

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of what is left of a tensor of `shape`."""
        at = len(shape) + self.dim
        return (*shape[:at], self.stop - self.start, *shape[at + 1 :])

    def stored(self, tensor: Tensor, step: int) -> Tensor:
        """A view of the entries of `tensor` [.., N, K] that the cut needs; one of them covers `step` logical ones."""
        first, last = self.start // step, -(-self.stop // step)
        return tensor.narrow(self.dim, first, last - first)

    @overload
    def of(self, whole: Tensor) -> Tensor: ...

    @overload
    def of(self, whole: Weight) -> Weight: ...

    def of(self, whole: Tensor | Weight) -> Tensor | Weight:
        """A view: of a stack of matrices, each is cut."""
        if isinstance(whole, Tensor):
            return self.stored(whole, 1)
        return whole.columns(self.start, self.stop) if self.dim == -1 else whole.rows(self.start, self.stop)


def misfits(config: ModelConfig, share: Share) -> list[str]:
    """The divided dimensions of the model that so many ranks do not divide, each in words."""
    divided = {
        "num_attention_heads": config.num_attention_heads,
        "o_groups": config.o_groups,
        "moe_intermediate_size": config.moe_intermediate_size,
        "vocab_size": config.vocab_size,
    }
    if share.by_expert:
        divided["n_routed_experts"] = config.n_routed_experts
    return [f"{name} = {n} does not divide by {share.size} ranks" for name, n in divided.items() if n % share.size]


def misfit(cut: Cut, format: str) -> str | None:
    """Why a matrix in `format` cannot be cut there without changing its scales: a sentence, or None when it can.

    A scale group must not be divided. FP8's blocks of 128 may, when a share lies within one: it takes the scale along.
    """
    part = cut.stop - cut.start
    if format == "fp8":
        group, fits = fp8.BLOCK, part % fp8.BLOCK == 0 or fp8.BLOCK % part == 0
    else:
        group = _COLUMN_GROUPS.get(format, 1) if cut.dim == -1 else 1
        fits = part % group == 0
    what = "columns" if cut.dim == -1 else "rows"
    if fits:
        return None
    return f"{cut.whole} {what} give shares of {part}, which do not fall on the {group} that share a scale in {format}"
