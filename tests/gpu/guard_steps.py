"""A step of a few torch operations for tests of the guard, and one planted fault per class.

Where a line makes the fault, it ends in `# fault: <class>`, which is how the tests know the line that must be named.
"""

import ctypes
import re
import subprocess
import threading
from pathlib import Path

import torch

from dsv4.engine.guard import allow

CUDA = torch.device("cuda")
SLOTS, ROOM, WIDTH = 8, 512, 16


def line_of(fault) -> str:
    """file:line of the marked line of a class."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if line.endswith(f"# fault: {fault.__name__}")]
    return f"tests/gpu/guard_steps.py:{number}"


def cudart() -> ctypes.CDLL:
    """The runtime library that torch has loaded, as another library would use it."""
    maps = Path("/proc/self/maps").read_text()
    return ctypes.CDLL(re.findall(r"\s(/\S*libcudart\.so\S*)$", maps, re.MULTILINE)[0])


class QuietStep:
    """Writes its token's vector beside its slot's earlier ones and answers with their sum; counts on by itself."""

    def __init__(self, subject, rows):
        self.subject, self.rows, self.graph = subject, rows, None
        self.staged = torch.zeros(3, rows, dtype=torch.int64).pin_memory()
        self.inputs = torch.zeros(3, rows, dtype=torch.int64, device=CUDA)  # slots, tokens, positions
        self.sums = torch.zeros(rows, WIDTH, device=CUDA)
        self.runtime = cudart()

    def stage(self, slots, tokens):
        self.staged[0] = SLOTS  # padding: the spare slot, which is no part of the memory
        self.staged[1:] = 0
        for row, (slot, token) in enumerate(zip(slots, tokens, strict=True)):
            self.staged[:, row] = torch.tensor([slot, token, self.subject.held[slot]])
        self.inputs.copy_(self.staged, non_blocking=True)

    def body(self):
        slots, tokens, positions = self.inputs
        self.subject.spare_and_past[slots, positions] = self.subject.table[tokens]
        seen = torch.arange(ROOM, device=CUDA) <= positions.unsqueeze(-1)
        past = self.subject.spare_and_past[slots]
        left = torch.where(seen.unsqueeze(-1), past, 0.0)
        while left.shape[1] > 1:  # torch.sum would leave bytes of its kernel's arguments as they were on the stack
            left = left[:, : left.shape[1] // 2] + left[:, left.shape[1] // 2 :]
        self.sums.copy_(left[:, 0])
        self.inputs[2] += 1

    def capture(self):
        self.graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(self.graph):
            self.body()

    def replay(self):
        self.graph.replay()

    def run(self):
        self.replay()

    def wait(self):
        """The host reads nothing of this step."""

    def outputs(self):
        return {"sums": self.sums}


class Notebook:
    """SLOTS slots of ROOM rows, and one spare slot for padding rows."""

    def __init__(self, make=QuietStep):
        generator = torch.Generator(CUDA).manual_seed(1)
        self.make, self.held = make, {}
        self.table = torch.randn(100, WIDTH, device=CUDA, generator=generator)
        self.spare_and_past = torch.randn(SLOTS + 1, ROOM, WIDTH, device=CUDA, generator=generator)

    def step(self, rows):
        return self.make(self, rows)

    def lengths(self):
        return [0, 1, 5, 300, 400]

    def place(self, lengths):
        self.held = dict(enumerate(lengths))
        return list(self.held)

    def tokens(self, count):
        return [7 + i for i in range(count)]

    def memory(self):
        return {"past": self.spare_and_past[:SLOTS]}

    def unread(self, slots):
        mask = torch.ones(SLOTS, ROOM, dtype=torch.bool)
        for slot in slots:
            mask[slot, : self.held[slot]] = False
        return {"past": mask}

    def writes(self, slots):
        mask = torch.zeros(SLOTS, ROOM, dtype=torch.bool)
        for slot in slots:
            mask[slot, self.held[slot]] = True
        return {"past": mask}


class ItemAtReplay(QuietStep):
    def replay(self):
        super().replay()
        self.sums[0, 0].item()  # fault: ItemAtReplay


class ItemAtStage(QuietStep):
    def stage(self, slots, tokens):
        super().stage(slots, tokens)
        self.sums[0, 0].item()  # fault: ItemAtStage


class ItemInBody(QuietStep):
    def body(self):
        super().body()
        self.sums[0, 0].item()  # fault: ItemInBody


class ZerosAtReplay(QuietStep):
    """Kept, and larger than anything cached: torch's allocator has to ask CUDA for memory."""

    def replay(self):
        super().replay()
        self.subject.__dict__.setdefault("kept", []).append(
            torch.zeros(1 << 26, dtype=torch.uint8, device=CUDA)  # fault: ZerosAtReplay
        )


class CachedZerosAtReplay(QuietStep):
    """Small and freed at once: torch's cache serves it, and CUDA hears of no allocation."""

    def replay(self):
        super().replay()
        torch.zeros(16, device=CUDA)  # fault: CachedZerosAtReplay


class PageableIn(QuietStep):
    def replay(self):
        super().replay()
        self.sums[0].copy_(torch.ones(WIDTH), non_blocking=True)  # fault: PageableIn


class PageableOut(QuietStep):
    def replay(self):
        super().replay()
        self.sums.cpu()  # fault: PageableOut


class PageableInBody(QuietStep):
    def body(self):
        super().body()
        self.sums[0].copy_(torch.ones(WIDTH), non_blocking=True)  # fault: PageableInBody


class LibraryMalloc(QuietStep):
    """A library that allocates on a thread of its own, past torch."""

    def work(self):
        address = ctypes.c_void_p()
        self.runtime.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(1 << 20))  # fault: LibraryMalloc
        self.runtime.cudaFree(address)

    def replay(self):
        super().replay()
        thread = threading.Thread(target=self.work, name="library")
        thread.start()
        thread.join()


class NativeThread(QuietStep):
    """A thread started in C that calls CUDA: there is no Python line to name."""

    def replay(self):
        super().replay()
        libc, thread = ctypes.CDLL(None), ctypes.c_void_p()
        libc.pthread_create(ctypes.byref(thread), None, self.runtime.cudaDeviceSynchronize, None)
        libc.pthread_join(thread, None)


class BakedLength(QuietStep):
    """The longest length, as a number, reaches a kernel."""

    def stage(self, slots, tokens):
        super().stage(slots, tokens)
        self.longest = max(self.subject.held[slot] for slot in slots)

    def body(self):
        super().body()
        self.sums += self.longest  # fault: BakedLength


class LengthInShape(QuietStep):
    """Only as many rows as there are tokens are summed: the launch depends on the length."""

    def stage(self, slots, tokens):
        super().stage(slots, tokens)
        self.longest = max(self.subject.held[slot] for slot in slots) + 1

    def body(self):
        super().body()
        self.subject.spare_and_past[SLOTS, : self.longest].mul_(1.0)  # fault: LengthInShape


class TwoGraphs(QuietStep):
    def replay(self):
        super().replay()
        super().replay()


class EagerKernel(QuietStep):
    def replay(self):
        super().replay()
        self.sums.mul_(1.0)  # fault: EagerKernel


class CompilesAtReplay(QuietStep):
    def replay(self):
        super().replay()
        subprocess.run(["true", "kernel.cu"], check=True)  # fault: CompilesAtReplay


class HostNode(QuietStep):
    """free(NULL) as a host function of the graph."""

    def body(self):
        super().body()
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.runtime.cudaLaunchHostFunc(stream, ctypes.CDLL(None).free, None)  # fault: HostNode


class AllocationNode(QuietStep):
    def body(self):
        super().body()
        address, stream = ctypes.c_void_p(), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.runtime.cudaMallocAsync(ctypes.byref(address), ctypes.c_size_t(64), stream)  # fault: AllocationNode
        self.runtime.cudaFreeAsync(address, stream)


class StaleReplay(QuietStep):
    """What eager adds anew each time, the graph has fixed."""

    def __init__(self, subject, rows):
        super().__init__(subject, rows)
        self.runs = 0

    def body(self):
        super().body()
        self.runs += 1
        self.sums += self.runs


class ReadsOthers(QuietStep):
    """Sums without a mask: what lies behind a sequence reaches its result."""

    def body(self):
        super().body()
        self.sums += self.subject.spare_and_past[self.inputs[0]].sum(1)


class PaddingWrites(QuietStep):
    """Padding rows write into the last slot that is somebody's."""

    def body(self):
        super().body()
        slots, _, positions = self.inputs
        last = torch.where(slots == SLOTS, SLOTS - 1, slots)
        self.subject.spare_and_past[last, positions] = self.sums


class Allowed(QuietStep):
    def replay(self):
        super().replay()
        with allow(reason="the test says so"):
            self.sums[0, 0].item()  # fault: Allowed
