"""Which phases of a program go on beside one another, in other blocks, and in what order the kernel takes them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate

from torch import Tensor

from dsv4.kernels.decode_layers.phases import Index, Inputs, Linear, Phase, Product
from dsv4.kernels.decode_layers.spread import SLICE_BLOCKS, WARPS
from dsv4.kernels.index_topk.index_topk import TOGETHER
from dsv4.kernels.tiles import COLUMNS

GROUP, INDEX_GROUP = 8, 12  # constants of program.cuh and index_phase.cuh
_SHARE = 4  # INDEX in no more than one block of so many: then it pays to multiply in the others meanwhile


def overlapped(phases: Sequence[Phase], grid: int) -> tuple[tuple[Phase, ...], dict[int, Inputs | Index]]:
    """The phases in the order in which the kernel takes them. Products of what Inputs norm come first where they can,
    and those go on beside them; products that an Index does not need come behind it where that pays, and go on beside
    it. By the place of such products: the Inputs that follow, or the Index in front.
    """
    order, beside = _with_index_beside(phases, grid)
    place = 0
    while place + 1 < len(order):
        inputs, then = order[place : place + 2]
        if isinstance(inputs, Inputs) and goes_on_beside(inputs, then):
            order[place : place + 2] = then, inputs
            beside[place] = inputs
            place += 1
        place += 1
    return tuple(order), beside


def _with_index_beside(phases: Sequence[Phase], grid: int) -> tuple[list[Phase], dict[int, Inputs | Index]]:
    order, beside = list[Phase](), dict[int, Inputs | Index]()
    for phase in phases:
        order.append(phase)
        if not isinstance(phase, Index) or not leaves_blocks(phase, grid):
            continue
        before = order[-2]
        needed, others = parted(before, phase) if isinstance(before, Linear) else ((), ())
        if needed and others:
            order[-2:] = Linear(needed), phase, Linear(others)
            beside[len(order) - 1] = phase
    return order, beside


def leaves_blocks(index: Index, grid: int) -> bool:
    """Whether `index` leaves enough of the blocks for others to multiply in meanwhile. Of long rows all have a part."""
    return entries_of(index) <= TOGETHER and len(index.args[0]) * GROUP * _SHARE <= grid


def entries_of(index: Index) -> int:
    """How many entries its rows can have."""
    keys, pages = index.args[3:5]
    return int(pages.shape[1] * keys.shape[1])


def parted(products: Linear, index: Index) -> tuple[tuple[Product, ...], tuple[Product, ...]]:
    """The products whose results `index` reads, and the others."""
    read = {x.data_ptr() for x in index.args if isinstance(x, Tensor)}
    needed = [any(out.data_ptr() in read for out in product.out) for product in products.products]
    every = [*zip(products.products, needed, strict=True)]
    return tuple(product for product, is_ in every if is_), tuple(product for product, is_ in every if not is_)


def goes_on_beside(inputs: Inputs, then: Phase) -> bool:
    """Whether `inputs` need not be waited for: `then` multiplies what is normed there, and can norm it by itself."""
    if not isinstance(then, Linear):
        return False
    (rows, columns), normed = inputs.args[0].shape, inputs.out[0].data_ptr()
    few = rows * -(-columns // (SLICE_BLOCKS * COLUMNS)) <= WARPS
    return few and all(product.x.data_ptr() == normed for product in then.products)


def blocks_of(phase: Inputs | Index, grid: int) -> range | tuple[int, ...]:
    """In which blocks it goes on where products go on beside it."""
    rows = len(phase.args[0])
    if isinstance(phase, Inputs):
        return range(grid - min(rows * (2 + 2 * len(phase.args[8])), grid // 8), grid)
    groups = grid // GROUP
    return tuple((INDEX_GROUP + row) % groups * GROUP + rank for row in range(rows) for rank in range(GROUP))


def around(cuts: Sequence[int], taken: Collection[int]) -> tuple[int, ...]:
    """Cuts of as many blocks more, of which those that are `taken` have nothing."""
    has = (block not in taken for block in range(len(cuts) - 1 + len(taken)))
    return tuple(cuts[place] for place in accumulate(has, initial=0))
