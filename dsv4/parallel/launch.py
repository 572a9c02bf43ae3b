"""Start the ranks of one host: the same command in N processes that know of each other."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from dsv4.parallel.mesh import STORE_FD

_GRACE = 10.0  # seconds that the others get to end in, once one has failed


def run_ranks(size: int, arguments: Sequence[str], timeout: float | None = None) -> int:
    """Run `python ARGUMENTS` as ranks 0..size-1 and wait. The exit status: 0, or of the first that failed, whose
    failure ends the others too, or 124 after `timeout` seconds. Rank 0 has this process's stdin.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        # All of it stays on this host, so the loopback interface is the one to talk over.
        common = {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo", **os.environ}
        common |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
        ranks = []
        for rank in range(size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            inherited = () if rank else (listener.fileno(),)
            if not rank:
                own[STORE_FD] = str(listener.fileno())
            ranks.append(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    env={**common, **own},
                    stdin=subprocess.DEVNULL if rank else None,
                    pass_fds=inherited,
                )
            )
    try:
        return _wait(ranks, None if timeout is None else time.monotonic() + timeout)
    except KeyboardInterrupt:  # the terminal sent it to the ranks as well
        return _end(ranks, 130)


def _wait(ranks: list[subprocess.Popen[bytes]], deadline: float | None) -> int:
    while True:
        states = [rank.poll() for rank in ranks]
        failed = [state for state in states if state]
        if failed:
            return _end(ranks, failed[0])
        if None not in states:
            return 0
        if deadline is not None and time.monotonic() > deadline:
            return _end(ranks, 124)
        time.sleep(0.02)


def _end(ranks: list[subprocess.Popen[bytes]], status: int) -> int:
    """End the ranks that still run: they would wait for the failed one for ever."""
    for rank in ranks:
        rank.terminate()
    deadline = time.monotonic() + _GRACE
    for rank in ranks:
        try:
            rank.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()
    return status if status > 0 else 128 - status
