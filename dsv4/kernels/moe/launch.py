"""The launches of moe: who goes where, two projections, the sum; and the buffers between them, sized by shapes."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.launch import bf16_only, contiguous, result, row_stride, same_device
from dsv4.kernels.loader import Kernel
from dsv4.kernels.moe.operand import ExpertsOperand
from dsv4.kernels.moe.tiled import TiledExperts
from dsv4.kernels.quantize.quantize_act import quantize_act
from dsv4.kernels.tiles import COLUMNS
from dsv4.quant.activations import Treatment

ALIGN, GATE_UP, DOWN = 1, 2, 4  # Phase in moe.cu
STREAM_ROWS = 128  #: up to so many tokens, weights stream past at most eight tokens of an expert at a time
STREAM_BLOCKS = 128  #: of 64 columns: what the warps of a block hold
STREAM_GROUP, WIDE_GROUP = 8, 128
MAX_EXPERTS = 1024

_KERNEL = Kernel("moe", "ppqiiiiqpppfpppqpipi")


class _Projection(ctypes.Structure):
    """Projection in moe.cu."""

    _fields_ = (
        ("tiles", ctypes.c_void_p),
        ("alpha", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("row_scale", ctypes.c_void_p),
        ("to", ctypes.c_void_p),
        ("x_row", ctypes.c_int64),
        ("rows", ctypes.c_int),
        ("columns", ctypes.c_int),
    )


@dataclass(frozen=True)
class Work:
    """One call: its operand, its sizes, and the device-made plan of which rows meet which expert."""

    ids: Tensor
    weights: Tensor
    first: TiledExperts
    second: TiledExperts
    group: int  #: tokens that share a pass over an expert's weights
    groups: int  #: how many groups fit: every expert may leave one unfilled
    plan: Tensor
    limit: float
    operand: ExpertsOperand

    @property
    def pairs(self) -> int:
        return self.ids.numel()

    def empty(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.ids.device)


def work_of(operand: ExpertsOperand, ids: Tensor, weights: Tensor, limit: float) -> Work:
    first, second = operand.w13, operand.down
    if not isinstance(first, TiledExperts) or not isinstance(second, TiledExperts):
        raise KernelError("moe: the operand was made on a CPU; make it from weights on the GPU")
    contiguous("moe", ids=ids, weights=weights)
    same_device("moe", first.tiles.device, ids=ids, weights=weights)
    _expect("ids", ids, (len(ids), ids.shape[-1]), torch.int64)
    _expect("weights", weights, tuple(ids.shape), torch.float32)
    experts, pairs = len(first.tiles), ids.numel()
    if not 0 < experts <= MAX_EXPERTS or pairs >= 2**31:
        raise KernelError(f"moe: {experts} experts, {pairs} pairs; the kernel takes 1..{MAX_EXPERTS} and 2^31 - 1")
    streams = len(ids) <= STREAM_ROWS and max(first.blocks, second.blocks) <= STREAM_BLOCKS
    group = STREAM_GROUP if streams else WIDE_GROUP
    groups = min(pairs, pairs // group + min(experts, pairs))
    plan = torch.empty(4 * groups + 2 * pairs + 1, dtype=torch.int32, device=ids.device)
    return Work(ids, weights, first, second, group, groups, plan, limit, operand)


def gate_up(work: Work, x: Tensor, row_scale: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x [T, D] bf16 -> [T * K, F] bf16 in the order of the experts: what `down` takes. Makes the plan."""
    _expect("x", x, (len(work.ids), work.first.columns), torch.bfloat16)
    mid = result("moe", out, (work.pairs, work.second.columns), torch.bfloat16, x.device)
    _launch(work, ALIGN | GATE_UP, _projection(work.first, x, row_scale, mid), _projection(work.second), x)
    return mid


def down(work: Work, mid: Tensor, row_scale: Tensor | None, shared: Tensor, out: Tensor | None = None) -> Tensor:
    """mid [T * K, F] bf16 in the order of the experts, shared [T, D] bf16 or f32 -> [T, D] like it. Needs the plan."""
    _expect("mid", mid, (work.pairs, work.second.columns), torch.bfloat16)
    out = _result(work, shared, out)
    parts = work.empty(work.pairs, work.first.columns)
    second = _projection(work.second, mid, row_scale, parts)
    _launch(work, DOWN, _projection(work.first), second, mid, shared, out)
    return out


def both(work: Work, x: Tensor, row_scale: Tensor | None, shared: Tensor, out: Tensor | None = None) -> Tensor:
    """x [T, D] bf16, shared [T, D] bf16 or f32 -> [T, D] like it: `gate_up` and `down`, nothing being treated in
    between, where weights are streamed."""
    _expect("x", x, (len(work.ids), work.first.columns), torch.bfloat16)
    out, mid = _result(work, shared, out), work.empty(work.pairs, work.second.columns)
    parts = work.empty(work.pairs, work.first.columns)
    first = _projection(work.first, x, row_scale, mid)
    second = _projection(work.second, mid, None, parts)
    _launch(work, ALIGN | GATE_UP | DOWN, first, second, x, shared, out)
    return out


def make_plan(work: Work) -> None:
    _launch(work, ALIGN, _projection(work.first), _projection(work.second), work.plan)


def launch_moe(
    x: Tensor, operand: ExpertsOperand, ids: Tensor, weights: Tensor, shared: Tensor, limit: float, out: Tensor | None
) -> Tensor:
    bf16_only("moe", "x", x)
    work = work_of(operand, ids, weights, limit)
    if operand.mid_treatment == "none" and work.group == STREAM_GROUP and operand.arrivals is not None:
        return both(work, *treated(x, operand.in_treatment), shared, out)
    mid = gate_up(work, *treated(x, operand.in_treatment))
    return down(work, *treated(mid, operand.mid_treatment), shared, out)


def treated(x: Tensor, how: Treatment) -> tuple[Tensor, Tensor | None]:
    return (x, None) if how == "none" else quantize_act(x, how)


def _result(work: Work, shared: Tensor, out: Tensor | None) -> Tensor:
    shape = len(work.ids), work.first.columns
    dtype = torch.float32 if shared.dtype == torch.float32 else torch.bfloat16
    _expect("shared", shared, shape, dtype)
    return result("moe", out, shape, dtype, shared.device)


def _projection(
    weight: TiledExperts, x: Tensor | None = None, row_scale: Tensor | None = None, to: Tensor | None = None
) -> _Projection:
    """One without `x` is not launched; its sizes count. It holds addresses: the caller holds the tensors until they
    are launched, or the memory of one becomes that of the next.
    """
    row = 0
    if x is not None:
        same_device("moe", weight.tiles.device, x=x, row_scale=row_scale, to=to)
        row = row_stride("moe", "x", x)
        if x.data_ptr() % 16 or row % 8:
            raise KernelError(f"moe: rows of 'x' must start at multiples of 16 bytes; strides {list(x.stride())}")
    if to is not None and to.data_ptr() % 16:
        raise KernelError(f"moe: 'out' must start at a multiple of 16 bytes; it starts {to.data_ptr() % 16} beyond one")
    pointers = (None if y is None else y.data_ptr() for y in (weight.tiles, weight.alpha, x, row_scale, to))
    return _Projection(*pointers, row, weight.tiles.shape[1], weight.columns)


def _launch(
    work: Work,
    phases: int,
    first: _Projection,
    second: _Projection,
    x: Tensor,
    shared: Tensor | None = None,
    out: Tensor | None = None,
) -> None:
    """x: what the projection of `phases` reads, or the first of two."""
    same_device("moe", work.ids.device, x=x, shared=shared)
    half = scale = None
    if work.group == WIDE_GROUP and phases != ALIGN:
        blocks = work.second.blocks if phases == DOWN else work.first.blocks
        half = work.empty(len(x), blocks * COLUMNS, dtype=torch.int16)
        scale = work.empty(len(x), dtype=torch.float32)
    _KERNEL(
        x.device,
        *(work.ids, work.plan, *work.ids.shape, work.operand.first, len(work.first.tiles), work.group, work.groups),
        *(ctypes.addressof(first), ctypes.addressof(second), work.weights, work.limit, half, scale),
        *(shared, 0 if shared is None else row_stride("moe", "shared", shared), out),
        *(shared is not None and shared.dtype == torch.float32, work.operand.arrivals, phases),
    )


def _expect(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if x.shape != shape or x.dtype != dtype:
        raise KernelError(f"moe: '{name}' is {list(x.shape)} {x.dtype}; expected {list(shape)} {dtype}")
