"""Kernels on this processor (tools/emulate): decode_layers beside its twin, in any order of threads; what is found."""

import ctypes
import functools
import re
import shutil

import pytest
import torch

from dsv4.engine.guard.bits import raw
from dsv4.kernels.compiler import FOLDER, INCLUDE
from dsv4.kernels.decode_layers.cases import chain
from dsv4.kernels.decode_layers.program import make_tables
from tools.emulate.build import CompileError, library, library_of
from tools.emulate.programs import SHARED_BYTES, left_by, programs, results
from tools.emulate.run import launched_here, libraries

PROGRAMS = {  # and blocks: with 32 a row, products go on beside an indexer
    "1 row": ({"rows": 1, "padding": 0, "format": "nvfp4", "short": True}, 32),
    "1 row of FP8": ({"rows": 1, "padding": 0, "format": "fp8", "short": True}, 16),
    "3 rows": ({"rows": 3, "padding": 1, "format": "fp8"}, 24),
    "2 ranks": ({"rows": 2, "padding": 0, "format": "bf16", "short": True, "ranks": 2}, 16),
    "long lists": ({"rows": 2, "padding": 1, "format": "nvfp4", "entries": 8193}, 16),
    "1 row of long lists": ({"rows": 1, "padding": 0, "format": "fp8", "entries": 8193}, 16),
}
EIGHT, RARE = 4, 8  # Joined in program.cuh
RELATIVE = 2.0**-7  # of a tensor's length: rounded to BF16 here and there, sums in another order
EQUAL = 0.97  # of packed bytes that are written, and of what is selected
SMALL = r"""
#include <cuda_runtime.h>
#include <dsv4/bulk.cuh>
#include <dsv4/launch.cuh>
using namespace dsv4;
constexpr int WORDS = 1024, BY_BULK = 1, BARRIER = 2;

// to[i] = the sum of four words, as the thread 40 further on found it.
__global__ void sums(const uint32_t* from, uint32_t* to, int waits) {
    extern __shared__ __align__(128) uint32_t words[];
    __shared__ __align__(8) uint64_t barrier;
    if (threadIdx.x == 0) barrier_init(shared_address(&barrier), 1);
    __syncthreads();
    if (threadIdx.x == 0) bulk_load(shared_address(words), from, WORDS * 4, shared_address(&barrier));
    if (waits & BY_BULK) barrier_wait(shared_address(&barrier), 0);
    const uint4 four = reinterpret_cast<const uint4*>(words)[threadIdx.x];
    __syncthreads();
    words[threadIdx.x] = four.x + four.y + four.z + four.w;
    if (waits & BARRIER) __syncthreads();
    to[threadIdx.x] = words[(threadIdx.x + 40) % blockDim.x];
    barrier_wait(shared_address(&barrier), 0);
}
extern "C" int dsv4_sums(const uint32_t* from, uint32_t* to, int waits, cudaStream_t stream) {
    return launch(sums, 1, 1, WORDS / 4, WORDS * 4, 1, stream, from, to, waits);
}

__global__ void wrong(int how) {
    extern __shared__ __align__(128) uint32_t words[];
    if (how == 0 && threadIdx.x < 32) asm volatile("bar.sync 1, %0;" ::"r"(64) : "memory");
    if (how == 1 && threadIdx.x % 32 < 8) __syncwarp();
    if (how == 1) __shfl_xor_sync(0xffffffffu, 1, 1);
    if (how == 2) *static_cast<int*>(nullptr) = 1;
    if (how == 3) barrier_wait(shared_address(words), 0);
    __syncthreads();
}
extern "C" int dsv4_wrong(int how, cudaStream_t stream) { return launch(wrong, 1, 1, 64, 128, 1, stream, how); }
"""


@functools.cache
def left(name: str, seed: int) -> dict[str, torch.Tensor]:
    program, grid = PROGRAMS[name]
    return left_by(programs(**program), grid, seed)


def unequal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, x in expected.items() if not torch.equal(raw(found[name]), raw(x))]


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_order_of_threads_leaves_the_same_bits(name):
    first, *others = [left(name, seed) for seed in range(3)]
    assert len(first) >= 50
    assert [unequal(found, first) for found in others] == [[], []]


@pytest.mark.parametrize(
    ("format", "more", "needs"),
    [
        ("nvfp4", {"short": True}, 0),
        ("bf16", {"short": True}, 0),
        ("fp8", {"short": True}, EIGHT),
        ("nvfp4", {}, RARE),
        ("nvfp4", {"short": True, "entries": 8193}, RARE),
        ("fp8", {}, EIGHT | RARE),
    ],
)
def test_a_program_says_which_kernel_will_do(format, more, needs):
    """FP8 weights; long lists to attend to or long rows to select from."""
    for rows in (1, 2):
        (small,) = programs(rows, 0, format, **more)
        with launched_here(0, 1):
            assert make_tables(small.program.phases, small.h, 16, SHARED_BYTES).needs == needs


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_phase_is_its_twin(name):
    """Of what the phases in front have left, but for what a phase tells the next without writing it."""
    program, _ = PROGRAMS[name]
    twins, rows, live = programs(**program), program["rows"], program["rows"] - program["padding"]
    first = [{what: x.clone() for what, x in results(small).items()} for small in twins]
    last = len(twins[0].phases) - 1
    for place in range(last + 1):
        for small in twins:
            chain(small.phases[place])
        for rank, small in enumerate(twins):
            for what, x in results(small).items():
                if what == "inbox" or place != (last if what == "y" else int(what[:2])):
                    continue
                mine = left(name, 0)[f"{what}, rank {rank}"]
                got, expected, before = (y[:live] if len(y) == rows else y for y in (mine, x, first[rank][what]))
                changed = (got != before) | (expected != before)
                got, expected = got[changed], expected[changed]
                if x.is_floating_point():
                    assert (got - expected).float().norm() <= RELATIVE * expected.float().norm(), what
                elif changed.any():
                    assert (got == expected).double().mean() >= EQUAL, what
                x.copy_(mine)


def test_ranks_leave_the_same_streams():
    found = left("2 ranks", 0)
    seams = [name for name in found if "Seam writes" in name and name.endswith("rank 0")]
    assert len(seams) == 12
    assert all(torch.equal(found[name], found[name.replace("rank 0", "rank 1")]) for name in seams)


def test_a_barrier_that_is_missing_is_found(tmp_path, monkeypatch):
    shutil.copytree(INCLUDE, tmp_path / "include")
    shutil.copytree(FOLDER / "decode_layers", tmp_path / "decode_layers")
    header = tmp_path / "include" / "dsv4" / "compress.cuh"
    with_it, without = ("    copies_wait();\n" + x + "    return to;\n" for x in ("    __syncthreads();\n", ""))
    assert header.read_text().count(with_it) == 1
    header.write_text(header.read_text().replace(with_it, without))
    expected, (program, grid) = left("1 row", 0), PROGRAMS["1 row"]
    monkeypatch.setitem(libraries, "decode_layers", library_of("decode_layers", tmp_path))
    assert unequal(left_by(programs(**program), grid, 0), expected)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> ctypes.CDLL:
    source = tmp_path_factory.mktemp("small") / "small.cu"
    source.write_text(SMALL)
    return library(source, INCLUDE)


def summed(small: ctypes.CDLL, waits: int) -> list[torch.Tensor]:
    given, found = torch.arange(1024, dtype=torch.int32), []
    for seed in range(4):
        found.append(torch.zeros(256, dtype=torch.int32))
        small.emulate_as(ctypes.c_uint64(seed), 1)
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in (given, found[-1])]
        assert small.dsv4_sums(*pointers, waits, None) == 0
    return found


def test_who_waits_finds_what_others_have_left(small):
    expected = torch.arange(1024, dtype=torch.int32).view(256, 4).sum(1).int().roll(-40)
    assert all(torch.equal(found, expected) for found in summed(small, 3))


@pytest.mark.parametrize("waits", [1, 2], ids=["not at the barrier", "not for the copy"])
def test_who_does_not_wait_is_found(small, waits):
    first, *others = summed(small, waits)
    assert any(not torch.equal(first, found) for found in others)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (0, r"nobody can go on:\n  block 0 warp 0 lanes f{8}: barrier 1 at small.cu:\d+\n  block 0 warp 1 .*barrier 0"),
        (1, r"block 0 warp \d, lane \d+: __\w+ at small.cu:\d+, while lane \d+ is at __\w+ at small.cu:\d+"),
        (2, r"block 0 warp \d, lane \d+: an access to \(nil\)"),
        (3, r"block 0 warp \d, lane \d+: there is no barrier at \d+ of shared memory"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(small, how, message):
    small.dsv4_error.restype = ctypes.c_char_p
    assert re.search(message, small.dsv4_error(small.dsv4_wrong(how, None)).decode())


def test_ptx_that_nobody_emulates_does_not_compile(tmp_path):
    source = tmp_path / "unknown.cu"
    source.write_text('#include <cuda_runtime.h>\n__device__ void f() { asm volatile("exit;"); }\n')
    with pytest.raises(CompileError, match=r"unknown.cu:2:.*(?s:.*)exit;"):
        library(source, INCLUDE)
