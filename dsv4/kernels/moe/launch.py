"""The launches of moe: who goes where, two projections, the sum; and the buffers between them, sized by shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.launch import contiguous, result, row_stride, same_device
from dsv4.kernels.loader import Kernel
from dsv4.kernels.moe.operand import ExpertsOperand
from dsv4.kernels.moe.tiled import TiledExperts
from dsv4.kernels.quantize.quantize_act import quantize_act
from dsv4.kernels.tiles import COLUMNS
from dsv4.quant.activations import Treatment

ALIGN, GATE_UP, DOWN = 1, 2, 4  # Phase in moe.cu
STREAM_ROWS = 128  #: up to so many tokens, weights stream past at most eight tokens of an expert at a time
STREAM_BLOCKS = 128  #: of 64 columns: what the warps of a block hold
STREAM_GROUP, WIDE_GROUP = 8, 64
MAX_EXPERTS = 1024

_KERNEL = Kernel("moe", "ppqiiiqppqippipfppppqpi")


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
    return Work(ids, weights, first, second, group, groups, plan, limit)


def gate_up(work: Work, x: Tensor, row_scale: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x [T, D] bf16 -> [T * K, F] bf16 in the order of the experts: what `down` takes. Makes the plan."""
    _expect("x", x, (len(work.ids), work.first.columns), torch.bfloat16)
    mid = result("moe", out, (work.pairs, work.second.columns), torch.bfloat16, x.device)
    _launch(work, ALIGN | GATE_UP, x, row_scale, work.first, mid, None, None)
    return mid


def down(work: Work, mid: Tensor, row_scale: Tensor | None, shared: Tensor, out: Tensor | None = None) -> Tensor:
    """mid [T * K, F] bf16 in the order of the experts, shared [T, D] bf16 -> [T, D] bf16. Needs the plan."""
    width = work.first.columns
    _expect("mid", mid, (work.pairs, work.second.columns), torch.bfloat16)
    _expect("shared", shared, (len(work.ids), width), torch.bfloat16)
    out = result("moe", out, (len(work.ids), width), torch.bfloat16, mid.device)
    _launch(work, DOWN, mid, row_scale, work.second, work.empty(work.pairs, width), shared, out)
    return out


def make_plan(work: Work) -> None:
    _launch(work, ALIGN, work.plan, None, work.first, None, None, None)


def launch_moe(
    x: Tensor, operand: ExpertsOperand, ids: Tensor, weights: Tensor, shared: Tensor, limit: float, out: Tensor | None
) -> Tensor:
    if x.dtype != torch.bfloat16:
        raise KernelError(
            f"moe: 'x' is {x.dtype}; the kernel takes bfloat16. dtype float32 on a GPU runs through the twins: set "
            "DSV4_REF=moe (or all)"
        )
    work = work_of(operand, ids, weights, limit)
    mid = gate_up(work, *treated(x, operand.in_treatment))
    return down(work, *treated(mid, operand.mid_treatment), shared, out)


def treated(x: Tensor, how: Treatment) -> tuple[Tensor, Tensor | None]:
    return (x, None) if how == "none" else quantize_act(x, how)


def _launch(
    work: Work,
    phases: int,
    x: Tensor,
    row_scale: Tensor | None,
    weight: TiledExperts,
    to: Tensor | None,
    shared: Tensor | None,
    out: Tensor | None,
) -> None:
    same_device("moe", work.ids.device, x=x, row_scale=row_scale, shared=shared, tiles=weight.tiles)
    if x.data_ptr() % 16 or (x.dim() > 1 and row_stride("moe", "x", x) % 8):
        raise KernelError(f"moe: rows of 'x' must start at multiples of 16 bytes; strides {list(x.stride())}")
    half = scale = None
    if work.group == WIDE_GROUP and phases != ALIGN:
        half = work.empty(len(x), weight.blocks * COLUMNS, dtype=torch.int16)
        scale = work.empty(len(x), dtype=torch.float32)
    _KERNEL(
        x.device,
        *(work.ids, work.plan, *work.ids.shape, len(work.first.tiles), work.group, work.groups),
        *(x, row_scale, row_stride("moe", "x", x) if x.dim() > 1 else 0, weight.columns),
        *(weight.tiles, weight.alpha, weight.tiles.shape[1], work.weights, work.limit, to, half, scale),
        *(shared, 0 if shared is None else row_stride("moe", "shared", shared), out, phases),
    )


def _expect(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if x.shape != shape or x.dtype != dtype:
        raise KernelError(f"moe: '{name}' is {list(x.shape)} {x.dtype}; expected {list(shape)} {dtype}")
