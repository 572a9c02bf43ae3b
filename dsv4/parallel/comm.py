"""What ranks tell each other: partial sums, shares of logits, and a text. The order of every sum is that of ranks.

A kernel may add up by itself (mhc_seam does, in a decode step); ranks then meet in inboxes.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dsv4.errors import ConfigError, KernelError

SUM = "DSV4_ALL_REDUCE"  # "nccl": without symmetric memory, for GPUs that cannot read each other's, and to compare
SYMMETRIC_BYTES = 1 << 26  # that peers may read: the shares of logits of a batch, and far more than any partial sum
ONE_SHOT_BYTES = 1 << 22  # up to here every rank reads all partial sums, so any decode step; longer ones go apart
_ONE_SHOT_SIZES = (2, 4, 8)  # of a group: torch's kernel adds in the order of ranks for these alone


class Comm(ABC):
    """Collectives of all ranks; each must be called by every one of them, in the same order."""

    def __init__(self, size: int):
        self.size = size

    @abstractmethod
    def add(self, x: Tensor) -> Tensor:
        """x [...] f32, contiguous, may be overwritten -> the sum over ranks, f32."""

    @abstractmethod
    def gather(self, x: Tensor, out: Tensor) -> None:
        """x [T, N] of every rank side by side into out [T, size * N]."""

    def all_reduce(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The ranks' partial sums x [T, D] f32 -> their sum, rounded once to `dtype`; the same bits on every rank.

        On a CPU, and for 2, 4 and 8 GPUs that can read each other's memory, the sum is ((x0 + x1) + x2) + ..., so a
        row's bits do not depend on the rows beside it. x is not to be used afterwards.
        """
        if x.dtype != torch.float32:
            raise KernelError(f"all_reduce: partial sums are float32, got {x.dtype}")
        x = x.contiguous()
        return self.add_apart(x, dtype) if self.apart(x.numel()) else self.add(x).to(dtype)

    def apart(self, elements: int) -> bool:
        """Whether `add_apart` is the faster way to add up so many."""
        return False

    def add_apart(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """As all_reduce, of x whose elements divide by the ranks: each rank is sent its part of the elements by all,
        adds it up, rounds it and tells the others. In bfloat16 (N - 1) / N x 6 bytes an element leave a rank, where an
        all-reduce in float32 takes 8.
        """
        return self.every(self.add_part(x, dtype)).view(x.shape)

    def add_part(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The first half of add_apart: this rank's part of the sum, [x.numel() / N]."""
        parts = x.new_empty(self.size, x.numel() // self.size)
        dist.all_to_all_single(parts, x.view(parts.shape))
        return added(parts).to(dtype)

    def every(self, part: Tensor) -> Tensor:
        """part [n, ...] of every rank -> [N * n, ...] in the order of ranks."""
        out = part.new_empty(self.size * len(part), *part.shape[1:])
        dist.all_gather_into_tensor(out, part.contiguous())
        return out

    def exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Rows of x [sum(sent), D], the first sent[0] for rank 0 and so on -> [sum(received), D], first what rank 0
        sent here.
        """
        out = x.new_empty(sum(received), x.shape[1])
        dist.all_to_all_single(out, x.contiguous(), list(received), list(sent))
        return out

    def inboxes(self, words: int) -> list[int] | None:
        """Memory of `words` int64, zeros, of each rank that all of them may write: its addresses in the order of ranks.
        It is never freed. None where ranks cannot write each other's memory.
        """
        return None

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Each rank's columns x [T, N] -> [T, size * N] in the order of ranks, in `out` if it is given."""
        if out is None:
            out = x.new_empty(len(x), self.size * x.shape[1])
        self.gather(x.contiguous(), out)
        return out

    def tell(self, text: str) -> str:
        """The text of rank 0, on every rank."""
        words = torch.tensor(list(text.encode()), dtype=torch.uint8)
        length = self._from_first(torch.tensor([len(words)]))
        received = torch.zeros(int(length), dtype=torch.uint8)
        received[: len(words)] = words[: len(received)]
        return bytes(self._from_first(received).tolist()).decode()

    def _from_first(self, x: Tensor) -> Tensor:
        dist.broadcast(x, 0)
        return x


def added(parts: Iterable[Tensor]) -> Tensor:
    """Their sum in their order, in the memory of the first."""
    total, *others = parts
    for other in others:
        total += other
    return total


class CpuComm(Comm):
    """Over gloo."""

    def add(self, x: Tensor) -> Tensor:
        return added(self._everyones(x))

    def gather(self, x: Tensor, out: Tensor) -> None:
        torch.cat(self._everyones(x), dim=1, out=out)

    def _everyones(self, x: Tensor) -> list[Tensor]:
        found = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(found, x)
        return found


class GpuComm(Comm):
    """Over symmetric memory, which needs neither the host nor NCCL's set-up in a graph, and NCCL for what is large.

    Launches of one rank follow one another on one stream: they share the buffer that peers read.
    """

    def __init__(self, size: int, device: torch.device):
        super().__init__(size)
        self.device = device
        how = os.environ.get(SUM, "symmetric")
        if how not in ("symmetric", "nccl"):
            raise ConfigError(f"{SUM} = {how!r} is unknown; leave it out or give nccl")
        self.symmetric = how == "symmetric"
        if self.symmetric:
            import torch.distributed._symmetric_memory as symmetric_memory

            group = dist.group.WORLD
            assert group is not None
            self._group = group.group_name
            self._buffer = symmetric_memory.empty(SYMMETRIC_BYTES // 4, dtype=torch.float32, device=device)
            self._ranks, self._handle = group, symmetric_memory.rendezvous(self._buffer, group)
            self._inboxes: list[Tensor] = []
        dist.barrier(device_ids=[device.index])  # NCCL connects now, not in a capture

    def add(self, x: Tensor) -> Tensor:
        if self.symmetric and self.size in _ONE_SHOT_SIZES and x.nbytes <= ONE_SHOT_BYTES:
            flat = x.view(-1)
            copied = torch.ops.symm_mem.one_shot_all_reduce_copy
            total: Tensor = copied(self._buffer[: len(flat)], flat, "sum", self._group)
            return total.view(x.shape)
        dist.all_reduce(x)
        return x

    def apart(self, elements: int) -> bool:
        return self.symmetric and 4 * elements > ONE_SHOT_BYTES and elements % self.size == 0

    def inboxes(self, words: int) -> list[int] | None:
        if not self.symmetric:
            return None
        import torch.distributed._symmetric_memory as symmetric_memory

        inbox = symmetric_memory.empty(words, dtype=torch.int64, device=self.device).zero_()
        torch.cuda.synchronize(self.device)
        addresses = list(symmetric_memory.rendezvous(inbox, self._ranks).buffer_ptrs)
        dist.barrier(device_ids=[self.device.index])  # zeros everywhere, before anybody writes
        self._inboxes.append(inbox)
        return addresses

    def gather(self, x: Tensor, out: Tensor) -> None:
        if self.symmetric and x.nbytes <= SYMMETRIC_BYTES:
            self._buffer[: x.numel()].view(x.shape).copy_(x)
            self._handle.barrier(channel=0)
            shares = [self._handle.get_buffer(rank, x.shape, torch.float32) for rank in range(self.size)]
            torch.cat(shares, dim=1, out=out)
            self._handle.barrier(channel=0)  # nobody overwrites what a peer still reads
            return
        shares = list(x.new_empty(self.size, *x.shape))
        dist.all_gather(shares, x)
        torch.cat(shares, dim=1, out=out)

    def _from_first(self, x: Tensor) -> Tensor:
        return super()._from_first(x.to(self.device)).cpu()
