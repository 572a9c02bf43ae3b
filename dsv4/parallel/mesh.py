"""Who this process is among the ranks of one model, and how it joins them."""

from __future__ import annotations

import atexit
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dsv4.errors import ConfigError
from dsv4.parallel.comm import Comm, CpuComm, GpuComm
from dsv4.parallel.shard import Share

STORE_FD = "DSV4_STORE_FD"  # rank 0 of our own launcher inherits the listening socket of the store
_TIMEOUT = timedelta(minutes=30)  # one rank may read a cold checkpoint while another waits
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


Experts = Literal["tp", "ep", "ep-a2a"]


@dataclass(frozen=True)
class Mesh:
    """One process of those that run a model together, each on a device of its own.

    Every rank runs the same steps on the same requests: what is not divided is computed by all of them, bit for bit
    alike, so tokens need no exchange.

    experts: how routed experts are divided. `tp`: each by its inner width, as the shared expert. `ep`: by their number,
    so that a rank computes with those it has for all rows. `ep-a2a`: likewise, but rows that the host plans (prompts)
    are sent to the ranks that have their experts (exchange.py).
    """

    rank: int
    size: int
    device: str
    comm: Comm
    experts: Experts = "tp"

    @property
    def share(self) -> Share:
        return Share(self.rank, self.size, by_expert=self.experts != "tp")

    def all_reduce(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The ranks' partial sums x [T, D] f32 -> their sum, rounded once to `dtype`; see Comm.all_reduce."""
        return self.comm.all_reduce(x, dtype)

    def own_rows(self, rows: int, width: int) -> slice:
        """Which rows of a step's [rows, width] this rank adds up and takes through the seams: all, or its part of them
        where many rows divide by the ranks.
        """
        if rows % self.size or not self.comm.apart(rows * width):
            return slice(0, rows)
        part = rows // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def add_rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """As all_reduce of x [T, D], of which this rank is given its part of the rows [T / N, D]."""
        return self.comm.add_part(x.contiguous(), dtype).view(-1, x.shape[1])

    def every_row(self, part: Tensor) -> Tensor:
        """The ranks' rows [T / N, ...] -> [T, ...]."""
        return self.comm.every(part)

    def inboxes(self, words: int) -> list[int] | None:
        """Memory of each rank that all of them may write; see Comm.inboxes."""
        return self.comm.inboxes(words)

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Each rank's columns x [T, N] -> [T, size * N]; see Comm.all_gather."""
        return self.comm.all_gather(x, out)


def is_rank() -> bool:
    """Whether torchrun, or `dsv4 --tp`, started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join(size: int, device: str = "cpu", experts: Experts = "tp") -> Mesh:
    """Meet the other ranks, of whom the environment tells (torchrun's variables). device: `cpu` (gloo), or `cuda`, of
    which each rank takes the one with its local number (NCCL and symmetric memory). experts: as Mesh says.

    ConfigError when this process is none of `size` ranks or has no device. Waits until all have come.
    """
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise ConfigError(
            f"tp = {size} needs {size} processes that know of each other, and this one lacks {', '.join(missing)}; "
            f"start it with `dsv4 ... --tp {size}` or `torchrun --nproc-per-node {size}`"
        )
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if world != size:
        raise ConfigError(f"tp = {size}, but {world} processes were started (WORLD_SIZE); make them the same number")
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or number:
        raise ConfigError(
            f"device {device!r} with tp = {size}: give cpu or cuda; each rank takes the GPU of its number"
        )
    if kind == "cuda":
        found = torch.cuda.device_count()
        if local >= found:
            raise ConfigError(
                f"process {local} of this host has no GPU: torch sees {found} here; start as many processes as there "
                "are GPUs, or give device cpu"
            )
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    if not dist.is_initialized():
        _meet(rank, size, device)
    comm = CpuComm(size) if kind == "cpu" else GpuComm(size, torch.device(device))
    return Mesh(rank, size, device, comm, experts)


def _meet(rank: int, size: int, device: str) -> None:
    inherited = os.environ.pop(STORE_FD, None)
    # torchrun's agent may serve the store itself; ours listens on this host alone, on the launcher's socket.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        is_master=serves,
        timeout=_TIMEOUT,
        master_listen_fd=None if inherited is None else socket.dup(int(inherited)),
    )
    gpu = None if device == "cpu" else torch.device(device)
    backend = "gloo" if gpu is None else "nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT, device_id=gpu)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
