"""decode_layers: its twin against the ops, and what a program tells the kernel: who reads which weights, and when."""

import ctypes
import inspect
import struct
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from dsv4.errors import KernelError
from dsv4.kernels.case import Maker
from dsv4.kernels.check import check_case
from dsv4.kernels.decode_layers import describe
from dsv4.kernels.decode_layers.beside import overlapped
from dsv4.kernels.decode_layers.cases import Small, cases
from dsv4.kernels.decode_layers.decode_layers import decode_layers
from dsv4.kernels.decode_layers.phases import Experts, Index, Inputs, Linear
from dsv4.kernels.decode_layers.program import CHUNK, WARPS, Program, make_tables
from dsv4.kernels.decode_layers.spread import Run, even_cuts, segments_of, spread
from dsv4.quant.weights import FP8Weight, NVFP4Weight, PlainWeight

CPU = torch.device("cpu")
FLASH_IN = ((64, 576, 0), (32, 576, 0), (64, 2048, 0), (64, 2048, 0), (16, 2048, 0), (16, 2048, 0), (4, 2048, 0))
PARTS = {
    "in_proj": FLASH_IN,
    "wo_a": tuple((64, 576, group) for group in range(8)),
    "ffn": ((16, 2048, 0), (128, 576, 0), (128, 576, 0)),
    "one tile": ((1, 1024, 0),),
    "in turns": ((5, 576, 0), (7, 2048, 0), (3, 1024, 0), (40, 576, 1)),
}


def test_the_twin_is_the_ops():
    for case in cases(Maker(CPU), True):
        row = check_case(case, timed=False)
        assert row.ok and row.equal == 1, row.finding


@pytest.mark.parametrize("grid", [16, 132])
@pytest.mark.parametrize("name", PARTS)
def test_a_block_has_tiles_of_one_input_and_no_more_bytes_than_it_must(name, grid):
    parts = PARTS[name]
    how = spread(parts, grid)
    tiles = [parts[place] for place in how.order for _ in range(parts[place][0])]
    assert len(how.cuts) == grid + 1 and how.cuts[0] == 0 and how.cuts[-1] == len(tiles)
    assert list(how.cuts) == sorted(how.cuts) and how.most == max(b - a for a, b in pairwise(how.cuts))
    kinds = [{(given, block == 2048) for _, block, given in tiles[a:b]} for a, b in pairwise(how.cuts)]
    assert all(len(found) <= 1 for found in kinds)
    busiest = max(sum(block for _, block, _ in tiles[a:b]) for a, b in pairwise(how.cuts))
    groups = len({(given, block == 2048) for _, block, given in parts})
    largest = max(block for _, block, _ in tiles)
    assert busiest <= sum(block for _, block, _ in tiles) / (grid - groups + 1) + largest


def test_blocks_that_the_busiest_leave_over_share_what_others_have():
    how = spread(((64, 576, 0), (192, 576, 0), (4, 2048, 0)), 132)  # one BF16 tile is as much as 3.5 others
    assert how.most == 2 and how.cuts[128] == 256 and how.cuts[132] == 260


def test_more_inputs_than_blocks_are_refused():
    with pytest.raises(KernelError, match="3 inputs of one phase for 2 blocks"):
        spread(tuple((2, 576, group) for group in range(3)), 2)


def lists_of(runs):
    """The kernel's walk, unit by unit, in Python: [block][warp] lists of (address, bytes, chunk)."""
    grid = len(runs[0].cuts) - 1
    lists = [[[] for _ in range(WARPS)] for _ in range(grid)]
    for run in runs:
        slices = -(-run.blocks // 8)
        tiles = [(a, t, size) for a, count, size in run.parts for t in range(count)]
        for block, warps in enumerate(lists):
            for tile in range(run.cuts[block], run.cuts[block + 1]):
                address, t, size = tiles[tile]
                for slice_ in range(slices):
                    unit = (tile - run.cuts[block]) * slices + slice_
                    count = min(8, run.blocks - 8 * slice_)
                    chunk = {576: 2304, 1024: 2048, 2048: 2048}[size]
                    at = address + (t * run.blocks + 8 * slice_) * size
                    warps[unit % WARPS].append((at, count * size, chunk))
            for warp in warps:
                if run.opens:
                    warp.append((0, 0, 0))
    for warps in lists:
        for warp in warps:
            warp.append((0, 0, 0))
    return lists


def test_segments_are_the_units_of_a_warp_in_its_order():
    parts = ((1 << 20, 9, 576), (1 << 21, 4, 1024), (1 << 22, 3, 2048))
    runs = [Run(parts, 20, (0, 5, 5, 13, 16), False), Run(parts[:1], 8, even_cuts(9, 4), True)]
    runs += [Run(parts[2:], 3, even_cuts(3, 4), False), Run(parts[1:2], 9, (0, 4, 4, 4, 4), True)]
    segments, starts = segments_of(runs)
    expected = [warp for warps in lists_of(runs) for warp in warps]
    found = [segments[a : a + len(warp)].tolist() for a, warp in zip(starts.tolist(), expected, strict=True)]
    assert segments.dtype.itemsize == 16 and (starts % 8 == 0).all()
    assert found == expected
    assert len(segments) - 16 >= starts[-1] + len(expected[-1])  # a warp loads sixteen ahead


KINDS = ("linear", "seam", "experts", "inputs", "index", "attention", "route")  # of program.cuh
JOINED = {  # whether C lets the next phase begin without a meeting, by what it is given
    "linear": lambda values: values[9] or values[-1] > 0,
    "index": lambda values: values[-1],
    "experts": lambda values: values[-3] > 0,
    "route": lambda values: True,
}


class Filled:
    """What is asked of decode_layers.cu: the functions by name with their arguments, each of the type that C takes.
    `cuts`, `told`: of each LINEAR, and the words that it tells; `shared`: where each ROUTE leaves what the shared
    expert makes. needs: what the phases of some functions say that they need of a kernel, as bits.
    """

    def __init__(self, monkeypatch, sizes=(64, 64, 64, 96, 20000, 4096), needs=None):
        self.calls, self.cuts, self.told, self.shared = [], [], [], []

        def call(kernel, device, *given):
            values = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in given]
            assert kernel.op == "decode_layers" and len(values) + 1 == len(kernel.types), kernel.part
            for value, kind in zip(values, kernel.types, strict=False):
                kind(value)
            if kernel.part == "sizes":
                (ctypes.c_int * 6).from_address(values[0])[:] = sizes
            else:
                joined = int(JOINED.get(kernel.part, lambda values: False)(values)) | (needs or {}).get(kernel.part, 0)
                (ctypes.c_int * 2).from_address(values[0])[:] = KINDS.index(kernel.part), joined
            if kernel.part == "linear":
                self.cuts.append([*(ctypes.c_uint16 * (values[4] + 1)).from_address(values[3])])
                parts = (describe._Part * values[2]).from_address(values[1])
                self.told.append([(part.out, part.out_stride) for part in parts if part.out_f32 == describe._TOLD])
            if kernel.part == "route":
                self.shared.append(describe._Part.from_address(values[13]).out)
            self.calls.append((kernel.part, values))

        class Fake(describe.Kernel):
            def __call__(self, device, *given):
                call(self, device, *given)

        for name in ("_SIZES", "_LINEAR", "_ROUTE", "_EXPERTS"):
            kernel = getattr(describe, name)
            monkeypatch.setattr(describe, name, Fake(kernel.op, kernel.letters, kernel.part))
        monkeypatch.setattr(describe, "_kernel", lambda name, letters: Fake("decode_layers", "p" + letters, name))


def on_tiles(monkeypatch):
    """Operands in the form they have on a GPU."""

    class Gpu:
        type = "cuda"

    for form in (NVFP4Weight, FP8Weight, PlainWeight):
        monkeypatch.setattr(form, "device", property(lambda self: Gpu()))


@pytest.mark.parametrize(
    ("rows", "padding", "grid"), [(1, 0, 24), (3, 1, 24), (8, 2, 24), (1, 0, 132), (4, 1, 132), (5, 0, 132)]
)
def test_tables_of_a_program(monkeypatch, rows, padding, grid):
    on_tiles(monkeypatch)
    small = Small(Maker(CPU), rows, padding, "nvfp4")
    filled = Filled(monkeypatch)
    tables = make_tables(small.program.phases, small.h, grid, 231424)
    names = [name for name, _ in filled.calls]
    layer = ["attention", "linear", "linear", "seam", "linear", "route", "experts"]
    begin = ["linear", "linear", "inputs"]  # products of what is normed beside the rest of the inputs
    apart = 32 * rows <= grid  # INDEX in a quarter of the blocks at most
    scored = ["index", "linear"] if apart else ["index"]
    assert names == ["sizes", *begin, *layer, "seam", *begin, *scored, *layer]
    phases, beside = overlapped(small.phases, grid)
    assert len(beside) == 2 + apart
    assert all(phases[place + 1 if isinstance(one, Inputs) else place - 1] is one for place, one in beside.items())
    assert tables.count == len(small.phases) + 2 + apart == len(names) - 1 and tables.grid == grid
    headers = [
        struct.unpack_from("<4i", bytes(phase)) for phase in tables.phases.view(-1, describe.PHASE_BYTES).tolist()
    ]
    kinds = [KINDS[kind] for kind, *_ in headers]
    assert kinds == names[1:] and [number for _, _, number, _ in headers] == list(range(len(kinds)))
    together, since = [[]], [{name for bit, name in enumerate(KINDS) if before >> bit & 1} for *_, before in headers]
    for kind, (_, joined, _, _) in zip(kinds, headers, strict=True):
        together[-1].append(kind)
        assert joined >> 1 == (len(together[-1]) > 1)
        if not joined & 1:
            together.append([])
    begin, layer = [["linear"], ["linear", "inputs"]], [["attention"], ["linear"], ["linear", "seam"], ["linear"]]
    assert together == [*begin, *layer, ["route", "experts", "seam"], *begin, scored, *layer, ["route", "experts"], []]
    expected = [set(met[:at]) if at else set(last) for last, met in pairwise([[], *together]) for at in range(len(met))]
    assert since == expected
    assert tables.work_bytes % 128 == 0 and tables.work_bytes >= 20000 and tables.state.tolist() == [0] * 96
    assert 2 <= tables.stages <= 8 and tables.work_bytes + WARPS * tables.stages * CHUNK <= 231424 - 4096
    told = {
        "linear": lambda values: values[-1],
        "experts": lambda values: values[-3],
        "seam": lambda values: values[-3],
    }
    routed = [words for words in filled.told if words]
    logits = [values[1] for name, values in filled.calls if name == "route"]
    assert routed == [[(words, small.phases[-1].args[0].shape[1])] for words in logits] and len(logits) == 2
    ranks = [(name, told[name](values)) for name, values in filled.calls if name in told]
    assert [name for name, size in ranks if size] == ["linear", "seam", "experts", "seam", "linear", "seam"], ranks
    assert [ranks[i + 1] for i, found in enumerate(ranks) if found in (("linear", 1), ("experts", 1))] == [
        ("seam", 1)
    ] * 3
    calls, shared = iter(filled.calls[1:]), iter(filled.shared)
    for phase in phases:
        name, values = next(calls)
        if isinstance(phase, Linear):
            part = (describe._Part * values[2]).from_address(values[1])
            assert values[2] >= len(phase.products) and values[4:6] == [grid, rows] and part
        if isinstance(phase, Experts):
            cuts = describe.shared_run(phase, grid).cuts
            assert name == "route" and values[-8:-6] == [rows, 8] and cuts[0] == 0 and cuts[grid - 1 :] == (32, 32)
            name, more = next(calls)
            assert name == "experts" and more[1] == next(shared) and values[-1] == more[-1] == tables.work_bytes
    read = np.frombuffer(tables.segments.numpy().tobytes(), dtype=[("from", "<u8"), ("bytes", "<i4"), ("chunk", "<i4")])
    operands = [p.operand for phase in small.phases if isinstance(phase, Linear) for p in phase.products]
    operands += [phase.shared_w2 for phase in small.phases if isinstance(phase, Experts)]
    every = sum(part.tiles.numel() for operand in operands for part in operand.launcher.parts)
    assert read["bytes"].sum() == every
    bounds = [*tables.starts.tolist(), len(read)]
    assert all((read["chunk"][a:b] == 0).sum() >= 1 + 2 for a, b in pairwise(bounds))


@pytest.mark.parametrize("needs", [{}, {"linear": 4}, {"attention": 8}, {"linear": 4, "index": 8}])
def test_one_phase_is_enough_for_a_large_kernel(monkeypatch, needs):
    on_tiles(monkeypatch)
    small = Small(Maker(CPU), 1, 0, "nvfp4")
    Filled(monkeypatch, needs=needs)
    tables = small.program.tables = make_tables(small.program.phases, small.h, 24, 231424)
    assert tables.needs == sum(needs.values())
    launched = []
    kernel = sys.modules[decode_layers.__module__]
    monkeypatch.setattr(kernel, "_KERNEL", lambda device, *given: launched.append(given))
    inspect.unwrap(decode_layers)(small.h, small.program)
    assert launched[0][6:9] == (tables.count, 1, tables.needs)


@pytest.mark.parametrize(("rows", "grid"), [(1, 40), (2, 72), (2, 104), (4, 132)])
def test_products_beside_an_index_have_no_tiles_where_it_works(monkeypatch, rows, grid):
    on_tiles(monkeypatch)
    small = Small(Maker(CPU), rows, 0, "nvfp4")
    filled = Filled(monkeypatch)
    make_tables(small.program.phases, small.h, grid, 231424)
    names = [name for name, _ in filled.calls]
    place = names.index("index")
    _, queries = filled.calls[place + 1]
    cuts = filled.cuts[names[: place + 1].count("linear")]
    header = (Path(describe.__file__).parents[1] / "include/dsv4/persistent/index_phase.cuh").read_text()
    groups, first = grid // 8, int(header.split("constexpr int INDEX_GROUP = ")[1].split(";")[0])
    for block, tiles in enumerate(b - a for a, b in pairwise(cuts)):
        group = block // 8  # index_row
        row = group - first % groups + (groups if group < first % groups else 0)
        works = group < groups and row < rows
        assert not (works and tiles), block
    assert sum(a == b for a, b in pairwise(cuts)) >= 8 * rows and cuts[0] == 0 and cuts[-1] == 8 * 512 // 16
    assert queries[7] is None and queries[9] == 0  # of what INPUTS has normed; then all meet


@pytest.mark.parametrize(("rows", "grid"), [(1, 132), (3, 132), (8, 24)])
def test_long_rows_are_selected_from_by_all_blocks(monkeypatch, rows, grid):
    on_tiles(monkeypatch)
    small = Small(Maker(CPU), rows, 0, "nvfp4", entries=8193)
    filled = Filled(monkeypatch)
    tables = make_tables(small.program.phases, small.h, grid, 231424)
    place = [name for name, _ in filled.calls].index("index")
    (before, _), (_, index), (then, _) = filled.calls[place - 1 : place + 2]
    assert (before, then) == ("inputs", "attention") and index[-2:] == [grid, 0]  # nothing goes on beside it
    assert tables.count == len(small.phases) + 2  # Experts are two phases


def test_a_block_keeps_the_keys_of_so_many_entries(monkeypatch):
    small = Small(Maker(CPU), 8, 0, "nvfp4")
    Filled(monkeypatch)
    (index,) = (phase for phase in small.phases if isinstance(phase, Index))
    pages = torch.zeros(8, 4096, dtype=torch.int64)
    index = Index((*index.args[:4], pages, *index.args[5:]), index.named, (torch.zeros(8, 64, dtype=torch.int64),))
    room = describe.Room(64, *[torch.zeros(1)] * 7, 0, 0, 0)
    describe.index(index, room, False)
    with pytest.raises(KernelError, match="rows of 262144 entries, 7 blocks for each; a block selects from 32768"):
        describe.index(index, replace(room, grid=63), False)


def test_what_does_not_fit_is_refused(monkeypatch):
    on_tiles(monkeypatch)
    small = Small(Maker(CPU), 2, 0, "nvfp4")
    Filled(monkeypatch, (64, 64, 64, 96, 170000, 4096))
    with pytest.raises(KernelError, match="work in 170000 bytes of shared memory, which leaves no two stages"):
        make_tables(small.program.phases, small.h, 24, 231424)
    with pytest.raises(KernelError, match="9 rows; a program takes 1 to 8"):
        Program([], torch.zeros(9, 4, 64), torch.zeros(9, 64))


def test_a_program_reads_the_weights_that_its_rows_use():
    one, many = (Small(Maker(CPU), rows, 0, "nvfp4").program.nbytes for rows in (1, 8))
    assert one < many
    assert decode_layers(*(lambda s: (s.h, s.program))(Small(Maker(CPU), 2, 0, "fp8"))).shape == (2, 512)
