"""From packed projections to launches: the table of parts, and where many tokens go instead."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels import tiles
from dsv4.kernels.launch import device_sizes
from dsv4.kernels.linear.schedule import (
    CONVERTED,
    DENSE,
    OWN,
    ROUND,
    SLICE_BLOCKS,
    SLICE_BYTES,
    SPLIT,
    Plan,
    padded_tokens,
    plan,
    tokens_at_once,
)
from dsv4.kernels.linear.schedule_few import FEW_TOKENS, plan_few
from dsv4.kernels.linear.tiled import Tiled
from dsv4.kernels.loader import Kernel

MAX_PARTS, MAX_GRID = 16, 256  # constants of include/dsv4/linear.cuh
_MANY_TOKENS = 192  # beyond, cuBLAS on unpacked slices of the weight is faster
_SLICE_VALUES = 1 << 25  # of such a slice, and of float32 results on their way
_JOINED_VALUES = 1 << 22  # results that are few enough to be worth one product for all parts
_STATIC_BYTES = 1024  # of shared memory, which kernel and driver use themselves
_FORMATS = {"nvfp4": 0, "fp8": 1, "bf16": 2}
_KERNEL = Kernel("linear", "piipipiiiiiiiiii")


class _Part(ctypes.Structure):
    """Part in include/dsv4/linear.cuh."""

    _fields_ = (
        ("tiles", ctypes.c_void_p),
        ("block_scale", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("row_scale", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("alpha", ctypes.c_float),
        ("format", ctypes.c_int),
        ("rows", ctypes.c_int),
        ("out_f32", ctypes.c_int),
        ("first_tile", ctypes.c_int),
        ("first_row", ctypes.c_int),
        ("scale_columns", ctypes.c_int),
        ("x_wide", ctypes.c_int),
        ("row_scale_stride", ctypes.c_int),
        ("input", ctypes.c_int),
    )


class Launcher:
    """Projections of equal K on one GPU, ready to be launched together.

    inputs [T, K] BF16 and outputs [T, N_i] BF16 or float32, one of each per part, rows evenly apart, columns
    contiguous; row_scales f32 [T] or None. Nothing is read back and nothing depends on values: a launch can
    be captured.
    """

    def __init__(self, parts: Sequence[Tiled]):
        if not 1 <= len(parts) <= MAX_PARTS:
            raise KernelError(f"linear: {len(parts)} projections; one launch takes 1 to {MAX_PARTS}")
        self.parts = tuple(parts)
        self.device, self.columns = parts[0].tiles.device, parts[0].shape[1]
        self.shapes = tuple((p.tiles.shape[0], p.tiles.shape[2]) for p in parts)
        self.tiles, self.blocks = sum(count for count, _ in self.shapes), parts[0].tiles.shape[1]
        self.table, first = (_Part * len(parts))(), 0
        for row, part in zip(self.table, parts, strict=True):
            row.tiles = part.tiles.data_ptr()
            if part.block_scale is not None:
                row.block_scale, row.scale_columns = part.block_scale.data_ptr(), part.block_scale.shape[1]
            row.alpha, row.format, row.rows = part.alpha, _FORMATS[part.format], part.shape[0]
            row.first_tile, row.first_row = first, part.first_row
            first += part.tiles.shape[0]
        self.cold = True

    def __call__(
        self, inputs: Sequence[Tensor], row_scales: Sequence[Tensor | None], outputs: Sequence[Tensor]
    ) -> None:
        total = len(inputs[0])
        if total > _MANY_TOKENS and all(part.exact for part in self.parts):
            with _unrounded_sums():
                self._multiply(inputs, row_scales, outputs)
            return
        processors, shared_limit = _gpu(self.device)
        step = tokens_at_once(shared_limit)
        for start in range(0, total, step):
            rows = slice(start, min(start + step, total))
            self._point(rows, inputs, row_scales, outputs)
            count = rows.stop - start
            spread = plan_few if count <= FEW_TOKENS else plan
            self._launch(spread(self.shapes, self.blocks, count, processors, shared_limit), count)

    def _multiply(
        self, inputs: Sequence[Tensor], row_scales: Sequence[Tensor | None], outputs: Sequence[Tensor]
    ) -> None:
        """Many tokens: the weight unpacked to BF16, the product by cuBLAS, float32 until its one rounding.

        Small neighbours that share an input become one product, of which a kernel takes each part's results.
        """
        self._point(slice(None), inputs, row_scales, outputs)
        places = range(len(self.parts))
        for _, run in groupby(places, lambda i: (inputs[i].data_ptr(), inputs[i].stride(0))):
            group = list(run)
            rows = sum(self.shapes[i][0] for i in group) * tiles.ROWS
            x = inputs[group[0]]
            if len(group) > 1 and rows * self.columns <= _SLICE_VALUES and rows * len(x) <= _JOINED_VALUES:
                self._together(group, rows, x)
            else:
                for i in group:
                    self._alone(i, inputs[i], row_scales[i], outputs[i])

    def _together(self, group: list[int], rows: int, x: Tensor) -> None:
        table = (_Part * len(group))(*(self.table[i] for i in group))
        for row in table:
            row.first_tile -= self.table[group[0]].first_tile
        sums = torch.mm(x, self._unpacked(table, rows).T, out_dtype=torch.float32)
        self._convert(table, rows, sums, len(x), ROUND)

    def _alone(self, place: int, x: Tensor, row_scale: Tensor | None, out: Tensor) -> None:
        part, direct = self.parts[place], row_scale is None and out.dtype == torch.bfloat16
        factor = part.alpha if row_scale is None else row_scale.unsqueeze(1) * part.alpha
        step = max(_SLICE_VALUES // max(self.columns, 0 if direct else len(x)) // tiles.ROWS, 1) * tiles.ROWS
        for start in range(0, part.shape[0], step):
            table = (_Part * 1)(self.table[place])
            block = part.tiles[start // tiles.ROWS :]
            count = min(step, part.shape[0] - start)
            table[0].tiles, table[0].first_row = block.data_ptr(), part.first_row + start
            table[0].first_tile, table[0].rows = 0, count
            values, to = self._unpacked(table, count).T, out[:, start : start + count]
            if direct:
                torch.addmm(to, x, values, beta=0, alpha=part.alpha, out=to)
            else:
                torch.mul(torch.mm(x, values, out_dtype=torch.float32), factor, out=to)

    def _unpacked(self, table: ctypes.Array[_Part], rows: int) -> Tensor:
        """The values of the table's parts, [rows, K] BF16."""
        values = torch.empty(rows, self.columns, dtype=torch.bfloat16, device=self.device)
        parts = (_Part * len(table))(*table)
        for row in parts:
            row.out, row.out_stride = values[row.first_tile * tiles.ROWS :].data_ptr(), self.columns
        self._convert(parts, rows, None, 0, DENSE)
        return values

    def _convert(self, table: ctypes.Array[_Part], rows: int, sums: Tensor | None, tokens: int, mode: int) -> None:
        count, address = -(-rows // tiles.ROWS), ctypes.addressof(table)
        sizes = tokens, self.columns, mode, 0, 0, 0, 0, 0, 0, 0
        _KERNEL(self.device, address, len(table), count, None, 0, sums, *sizes)

    def _point(
        self, rows: slice, inputs: Sequence[Tensor], row_scales: Sequence[Tensor | None], outputs: Sequence[Tensor]
    ) -> None:
        seen: dict[tuple[int, int, bool], int] = {}  # tokens that are staged in one form
        for row, x, scale, out in zip(self.table, inputs, row_scales, outputs, strict=True):
            row.x, row.x_stride = x[rows].data_ptr(), x.stride(0)
            row.input = seen.setdefault((row.x, row.x_stride, row.format == _FORMATS["bf16"]), len(seen))
            row.x_wide = row.x % 16 == 0 and (row.x_stride % 8 == 0 or len(x) == 1)
            row.row_scale = None if scale is None else scale[rows].data_ptr()
            row.row_scale_stride = 0 if scale is None else scale.stride(0)
            row.out, row.out_stride = out[rows].data_ptr(), out.stride(0)
            row.out_f32 = out.dtype == torch.float32

    def _launch(self, how: Plan, tokens: int) -> None:
        cuts = (ctypes.c_uint32 * len(how.cuts))(*how.cuts)
        scratch = self._scratch(how, tokens) if tokens > FEW_TOKENS else None
        _KERNEL(
            self.device,
            ctypes.addressof(self.table),
            len(self.table),
            self.tiles,
            ctypes.addressof(cuts),
            how.grid,
            scratch,
            tokens,
            self.columns,
            how.mode,
            how.window,
            how.batch,
            how.stages,
            how.ranks,
            how.height,
            self.cold,
            how.shared_bytes,
        )

    def _scratch(self, how: Plan, tokens: int) -> Tensor | None:
        """What the kernels of a launch of more than eight tokens hand on, of each token and slice: sums, or what is
        staged and what undoes its scaling. None where every block stages all slices of the one input itself.
        """
        slices, inputs = -(-self.blocks // SLICE_BLOCKS), 1 + max(row.input for row in self.table)
        if how.mode == OWN and tokens <= CONVERTED and inputs == 1 and how.window == slices:
            return None
        each = self.tiles * tiles.ROWS if how.mode == SPLIT else inputs * (SLICE_BYTES // 4 + 1)
        return torch.empty(slices * padded_tokens(tokens) * each, dtype=torch.float32, device=self.device)


class Launched(Protocol):
    """An operand of linear or grouped_linear."""

    @property
    def launcher(self) -> Launcher | None: ...


def follows(then: Launched, first: Launched) -> None:
    """`then` is launched right behind `first`, which runs the same code: it need not bring its code into the caches
    while it waits for its turn, as launches of few tokens do.
    """
    if then.launcher is not None and first.launcher is not None:
        then.launcher.cold = False


@contextmanager
def _unrounded_sums() -> Iterator[None]:
    """cuBLAS may not round what it adds up: results are rounded once."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


@functools.cache
def _gpu(device: torch.device) -> tuple[int, int]:
    """Processors (no more blocks are started), and the shared memory one block may ask for."""
    processors, shared = device_sizes(device)
    return min(processors, MAX_GRID), shared - _STATIC_BYTES
