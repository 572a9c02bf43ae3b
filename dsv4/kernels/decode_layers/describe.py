"""Phases as the kernel reads them: each is filled by the function of decode_layers.cu that knows its arguments."""

from __future__ import annotations

import ctypes
import functools
import inspect
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.attn_inputs.attn_inputs import attn_inputs
from dsv4.kernels.decode_layers.beside import GROUP, around, blocks_of, entries_of
from dsv4.kernels.decode_layers.phases import Attention, Call, Experts, Index, Inputs, Linear, Phase, Product, Seam
from dsv4.kernels.decode_layers.spread import SLICE_BLOCKS, Run, even_cuts, spread
from dsv4.kernels.grouped_linear.operand import GroupedOperand
from dsv4.kernels.index_topk.index_topk import PAGE, RANGE, TOGETHER, index_topk
from dsv4.kernels.launch import row_stride
from dsv4.kernels.linear.launch import Launcher, _Part
from dsv4.kernels.linear.operand import LinearOperand
from dsv4.kernels.loader import Kernel, noted
from dsv4.kernels.mhc_seam.mhc_seam import mhc_seam
from dsv4.kernels.mhc_seam.peers import Peers, inbox_words
from dsv4.kernels.moe.tiled import TiledExperts
from dsv4.kernels.sparse_attention.sparse_attention import longer, sparse_attention

LONG_GROUP_BYTES = 4 << 20  # constant of attention_phase.cuh
MADE_LEAST, MADE_BYTES = 8192, 16  # of linear_phase.cuh: constant; of a tile
PHASE_BYTES, PLAN_BYTES = 2048, 1024  # constant of program.cuh; at least what experts_plan.cuh has
_TOLD = 2  # of Results in linear_phase.cuh
_HEADER = struct.Struct("<4i")  # of Phase in program.cuh: kind, joined, number, before
_NEXT, _LAST, _NEEDS = 1, 2, 4 | 8  # Joined there
_SCORES, _PARTS = 7, 9  # of index_topk's arguments; of sparse_attention's
_SIZES = Kernel("decode_layers", "piiiiii", "sizes")
_LINEAR = Kernel("decode_layers", "p" + "pipiiipfi" + "ppii", "linear")
_ROUTE = Kernel("decode_layers", "p" + "ppppqfpqpqpqppp" + "iiiiifii", "route")
_EXPERTS = Kernel("decode_layers", "p" + "pppq" + "pppppp" + "iiiiif" + "ppii" + "ii", "experts")


def ready(device: torch.device) -> None:
    """Load the library."""
    _SIZES.ready(device)


@dataclass(frozen=True)
class Room:
    """What phases keep outside of their tensors, and the shared memory that those take which are not LINEAR."""

    grid: int
    words: Tensor  # of seams
    index: Tensor
    attention: Tensor
    mid: Tensor  # of experts
    plan: Tensor  # of their pairs
    logits: Tensor  # words of the router's
    shared: Tensor  # what the shared expert makes
    state_bytes: int
    work_bytes: int  # at least
    fixed_bytes: int  # of a block's shared memory, before the work area
    long: list[Tensor] = field(default_factory=list)

    def chunks(self) -> Tensor:
        """Attention's of long rows; made when first asked for."""
        if not self.long:
            size = max(self.grid // GROUP, 1) * LONG_GROUP_BYTES
            self.long.append(torch.zeros(size, dtype=torch.uint8, device=self.words.device))
        return self.long[0]

    @staticmethod
    def on(device: torch.device, grid: int, rows: int, width: int, like: Experts) -> Room:
        """width: D. like: one of the program's phases, which are all of one size."""
        inner, topk = like.args[1].shape[1], like.routing["topk"]
        sizes = (ctypes.c_int * 6)()
        _SIZES(device, ctypes.addressof(sizes), grid, rows, width, inner, like.args[0].shape[1], topk)
        words, index, attention = (torch.zeros(max(n, 16), dtype=torch.uint8, device=device) for n in sizes[:3])
        mid = torch.zeros(rows * topk, inner, dtype=torch.bfloat16, device=device)
        plan = torch.zeros(PLAN_BYTES, dtype=torch.uint8, device=device)
        logits = torch.zeros(rows, like.args[0].shape[1], dtype=torch.int64, device=device)
        shared = torch.zeros(rows, width, dtype=torch.float32, device=device)
        return Room(grid, words, index, attention, mid, plan, logits, shared, sizes[3], sizes[4], sizes[5])


@dataclass(frozen=True)
class Joined:
    """A LINEAR phase: its parts in the order in which they are spread."""

    parts: tuple[_Part, ...]
    run: Run
    columns: int
    most: int  # tiles of a block
    norm: Inputs | None  # what goes on meanwhile, in blocks without tiles, and whose norm is made here too
    told: Peers | None  # whom the result is told instead of being written

    def work_bytes(self, rows: int) -> int:
        """What linear_phase.cuh lays out."""
        slices = -(-self.run.blocks // SLICE_BLOCKS)
        norm = 0 if self.norm is None else slices * 2048
        made = max(rows * (slices * 1024 + 16) + slices * 32 + self.most * slices * rows * 64, MADE_LEAST)
        return made + self.most * MADE_BYTES + norm

    def phase(self, device: torch.device, rows: int) -> bytes:
        table = (_Part * len(self.parts))(*self.parts)
        cuts = (ctypes.c_uint16 * len(self.run.cuts))(*self.run.cuts)
        given = ctypes.addressof(table), len(table), ctypes.addressof(cuts), len(cuts) - 1, rows, self.columns
        norm = (None, 0.0, 0) if self.norm is None else (self.norm.args[1], self.norm.named["eps"], 1)
        return _filled(_LINEAR, device, *given, *norm, *_ranks(self.told))


def joined(
    phase: Linear,
    grid: int,
    beside: Inputs | Index | None = None,
    told: Peers | None = None,
    words: Mapping[int, Tensor] = MappingProxyType({}),
) -> Joined:
    """beside: what goes on meanwhile, in blocks that get no tiles. words: by address of a result, those that are told
    instead.
    """
    products = phase.products
    taken = () if beside is None else blocks_of(beside, grid)
    norm = beside if isinstance(beside, Inputs) else None
    if norm is not None:
        products = tuple(replace(product, x=norm.args[0]) for product in products)
    parts = [part for product in products for part in _parts(product)]
    for part in parts:
        if part.out in words:
            told_as = words[part.out]
            part.out, part.out_stride, part.out_f32 = told_as.data_ptr(), told_as.stride(0), _TOLD
    launchers = [_launcher(product.operand) for product in products]
    columns, blocks = launchers[0].columns, launchers[0].blocks
    if any(launcher.columns != columns for launcher in launchers):
        raise KernelError("decode_layers: products of one phase have one K")
    inputs = {address: number for number, address in enumerate(dict.fromkeys(part.x for part in parts))}
    shapes = [shape for launcher in launchers for shape in launcher.shapes]
    how = spread(tuple((*shape, inputs[part.x]) for shape, part in zip(shapes, parts, strict=True)), grid - len(taken))
    first = 0
    for place in how.order:
        parts[place].first_tile = first
        first += shapes[place][0]
    weights = tuple((parts[place].tiles, *shapes[place]) for place in how.order)
    cuts = around(how.cuts, taken)
    return Joined(tuple(parts[i] for i in how.order), Run(weights, blocks, cuts, False), columns, how.most, norm, told)


def shared_run(phase: Experts, grid: int) -> Run:
    """The weights of the shared expert's second product, which all blocks share evenly but the last, which routes."""
    launcher, others = _launcher(phase.shared_w2), max(grid - 1, 1)
    (tiles, size), part = launcher.shapes[0], launcher.table[0]
    cuts = even_cuts(tiles, others)
    return Run(((part.tiles, tiles, size),), launcher.blocks, cuts + cuts[-1:] * (grid - others), True)


def route(phase: Experts, room: Room, work_bytes: int) -> bytes:
    """What comes in front of `experts`."""
    logits, gate, up, bias, tid2eid, tokens = phase.args
    launcher, (rows, width), topk = _launcher(phase.shared_w2), phase.x.shape, phase.routing["topk"]
    inner = launcher.columns
    if gate.shape[1] != inner:
        raise KernelError(f"decode_layers: a shared expert of {gate.shape[1]} channels and weights for {inner}")
    shared = (_Part * 1)(launcher.table[0])
    shared[0].row_scale, shared[0].row_scale_stride = None, 0
    shared[0].out, shared[0].out_stride = room.shared.data_ptr(), width
    shared[0].out_f32 = phase.out.dtype == torch.float32
    cuts = (ctypes.c_uint16 * (room.grid + 1))(*shared_run(phase, room.grid).cuts)
    x_row, *strides = [row_stride("decode_layers", "x", tensor) for tensor in (phase.x, gate, up)]
    vocabulary = 0 if tid2eid is None else len(tid2eid)
    routing = room.logits, bias, tid2eid, tokens, vocabulary, phase.routing["route_scale"], phase.x, x_row
    product = gate, strides[0], up, strides[1], ctypes.addressof(shared), ctypes.addressof(cuts), room.plan
    sizes = rows, logits.shape[1], topk, width, inner
    given = *routing, *product, *sizes, phase.routing["limit"], room.grid, work_bytes
    return _filled(_ROUTE, phase.x.device, *given)


def experts(phase: Experts, room: Room, work_bytes: int, told: Peers | None = None) -> bytes:
    x, first, second = phase.x, phase.experts.w13, phase.experts.down
    if not isinstance(first, TiledExperts) or not isinstance(second, TiledExperts):
        raise KernelError("decode_layers: the experts were made on a CPU; make them from weights on the GPU")
    (rows, width), inner = x.shape, second.columns
    if phase.experts.in_treatment != "none" or _launcher(phase.shared_w2).columns != inner:
        raise KernelError(f"decode_layers: a shared expert beside others of {inner} channels, or a quantised input")
    given = room.shared, room.plan, x, row_stride("decode_layers", "x", x)
    weights = first.tiles, first.alpha, second.tiles, second.alpha, room.mid, phase.out
    sizes = phase.out.dtype == torch.float32, rows, phase.routing["topk"], width, inner, phase.routing["limit"]
    return _filled(_EXPERTS, x.device, *given, *weights, *sizes, *_ranks(told), room.grid, work_bytes)


def whom(phase: Phase, then: Phase | None) -> Peers | None:
    """The ranks that a phase tells what it makes, where a seam behind it needs that: blocks do not meet in between."""
    if not isinstance(then, Seam):
        return None
    made = phase.out if isinstance(phase, Experts) else phase.products[0].out[0] if isinstance(phase, Linear) else None
    if made is None or made.data_ptr() != then.args[0].data_ptr():
        return None
    return then.named.get("peers") or _alone(then.args[0].device)[0]


@functools.cache
def _alone(device: torch.device) -> tuple[Peers, Tensor]:
    """Where one rank tells itself what a seam hears, for all programs of a device, which follow one another."""
    inbox = torch.zeros(inbox_words(1), dtype=torch.int64, device=device)
    return Peers.of(0, [inbox.data_ptr()], device, lambda y: y), inbox


def seam(phase: Seam, room: Room, told: Peers | None) -> bytes:
    if told is None:
        raise KernelError("decode_layers: a seam whose y is not what the phase in front of it makes")
    letters, given = _launched(mhc_seam, phase, phase.out)
    kept = [*range(12), *range(13, 19)]  # not where a launch keeps its sums, and the dtype is BF16
    letters = "".join(letters[i] for i in (*kept, *range(20, 24)))
    return _like("seam", letters, [*(given[i] for i in kept), *_ranks(told)], room.words, room.grid)


def _ranks(peers: Peers | None) -> tuple[Any, ...]:
    """Inboxes, turns, rank and size, as C takes them."""
    if peers is None:
        return None, None, 0, 0
    return ctypes.addressof(peers.inboxes), peers.turns, peers.rank, peers.size


def inputs(phase: Inputs, room: Room) -> bytes:
    return _like("inputs", *_launched(attn_inputs, phase, phase.out))


def index(phase: Index, room: Room, joined: bool) -> bytes:
    """joined: products that follow go on beside it."""
    entries, blocks = entries_of(phase), room.grid // len(phase.args[0])
    if entries > TOGETHER and -(-entries // PAGE // blocks) * PAGE > RANGE:
        raise KernelError(
            f"decode_layers: rows of {entries} entries, {blocks} blocks for each; a block selects from {RANGE}"
        )
    letters, given = _launched(index_topk, phase, phase.out[0])
    given = *given[:_SCORES], room.index, *given[_SCORES + 1 :]  # scores stay in shared memory
    return _like("index", letters, given, room.index, room.grid, int(joined))


def attention(phase: Attention, room: Room) -> bytes:
    letters, given = _launched(sparse_attention, phase, phase.out[0])
    kept = [i for i in range(len(given)) if i != _PARTS]  # blocks tell each other theirs
    widths = phase.args[2].shape[1], 0 if phase.args[4] is None else phase.args[4].shape[1]
    told = room.attention, room.chunks() if longer(*widths) else room.attention
    return _like("attention", "".join(letters[i] for i in kept), [given[i] for i in kept], *told, room.grid)


FILL: dict[type, Callable[[Any, Room], bytes]] = {Inputs: inputs, Attention: attention}


def _launched(op: Callable[..., Any], phase: Call, out: Any) -> tuple[str, tuple[Any, ...]]:
    """What the op would launch, checked as it checks it: letters and arguments."""
    with noted() as launches:
        inspect.unwrap(op)(*phase.args, **phase.named, out=out)
    if len(launches) != 1 or launches[0].op != op.__name__:
        raise KernelError(f"decode_layers: {op.__name__} is not one launch here but {[found.op for found in launches]}")
    return launches[0].letters, launches[0].arguments


def _like(name: str, letters: str, given: Sequence[Any], *scratch: Tensor | int) -> bytes:
    """A phase whose arguments are those of an op and then `scratch`."""
    more = "".join("p" if isinstance(value, Tensor) else "i" for value in scratch)
    first = next(value for value in given if isinstance(value, Tensor))
    return _filled(_kernel(name, letters + more), first.device, *given, *scratch)


@functools.cache
def _kernel(name: str, letters: str) -> Kernel:
    return Kernel("decode_layers", "p" + letters, name)


def in_order(phases: Sequence[bytes]) -> list[bytes]:
    """The phases of a program, each with its place in it: number, the kinds of those in front since blocks last met, as
    bits, and whether blocks meet in front of it.
    """
    before, joined, found = 0, 0, []
    for number, phase in enumerate(phases):
        last = _LAST if joined & _NEXT else 0
        kind, joined = _HEADER.unpack_from(phase)[:2]
        found.append(_HEADER.pack(kind, joined | last, number, before) + phase[_HEADER.size :])
        before = (before if last else 0) | 1 << kind
    return found


def needs(phase: bytes) -> int:
    """What it needs that the smallest kernels do not have: bits of Joined."""
    return _HEADER.unpack_from(phase)[1] & _NEEDS


def _filled(kernel: Kernel, device: torch.device, *given: Any) -> bytes:
    phase = ctypes.create_string_buffer(PHASE_BYTES)
    kernel(device, ctypes.addressof(phase), *given)
    return phase.raw


def _launcher(operand: LinearOperand | GroupedOperand) -> Launcher:
    launcher = operand.launcher
    treated = [operand.treatment] if isinstance(operand, GroupedOperand) else [j.treatment for j in operand.joined]
    if launcher is None or set(treated) != {"none"}:
        raise KernelError("decode_layers: a projection whose weights are not on the GPU, or whose input is quantised")
    return launcher


def _parts(product: Product) -> list[_Part]:
    """The operand's parts, pointed at what this product reads and writes."""
    launcher, (x, outputs) = _launcher(product.operand), (product.x, list(product.out))
    inputs = [x] * len(outputs)
    if isinstance(product.operand, GroupedOperand):
        groups = len(launcher.parts)
        inputs = list(x.unflatten(1, (groups, -1)).unbind(1))
        outputs = list(outputs[0].unflatten(1, (groups, -1)).unbind(1))
    parts = list((_Part * len(outputs))(*launcher.table))
    for part, given, out in zip(parts, inputs, outputs, strict=True):
        part.x, part.x_stride = given.data_ptr(), given.stride(0)
        part.x_wide = part.x % 16 == 0 and (part.x_stride % 8 == 0 or len(given) == 1)
        part.row_scale, part.row_scale_stride = None, 0
        part.out, part.out_stride, part.out_f32 = out.data_ptr(), out.stride(0), out.dtype == torch.float32
    return parts
