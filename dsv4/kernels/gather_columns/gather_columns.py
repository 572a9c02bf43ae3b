"""Each rank's columns side by side on every rank: the logits of a decode step."""

from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.gather_columns.gather_columns_ref import gather_columns_ref
from dsv4.kernels.launch import contiguous, result
from dsv4.kernels.loader import Kernel
from dsv4.kernels.mhc_seam.peers import RANKS, Peers, meeting
from dsv4.kernels.op import op

ROWS, TURNS = 128, 2  # rows that an inbox has room for; numbers to count turns with
_KERNEL = Kernel("gather_columns", "ppiippii")


def gather_words(size: int, columns: int) -> int:
    """int64 of one rank's inbox [2, size, ROWS, columns in fours] of 4 bytes."""
    return 2 * size * ROWS * -(-columns // 4) * 2  # two values each


@op("gather_columns", ref=gather_columns_ref, shapes={"x": "T N : f32"})
def gather_columns(x: Tensor, peers: Peers, *, out: Tensor | None = None) -> Tensor:
    """x [T, N] f32 of every rank -> [T, size * N] f32 in the order of ranks, on each of them. T = 0 to ROWS.

    peers: all ranks, with inboxes of gather_words(size, N) int64 that serve no other op, and TURNS turns. Every rank
    calls for the same rows in the same order, and waits for all. One launch, in which each float32 takes 4 bytes to
    another rank.
    """
    rows, columns = x.shape
    if rows > ROWS or peers.size > RANKS or len(peers.turns) < TURNS:
        raise KernelError(
            f"gather_columns: 'x' is {list(x.shape)} of {peers.size} ranks with {len(peers.turns)} turns; expected at "
            f"most {ROWS} rows and {RANKS} ranks, with {TURNS} turns"
        )
    contiguous("gather_columns", x=x)
    out = result("gather_columns", out, (rows, peers.size * columns), x.dtype, x.device)
    _KERNEL(x.device, x, out, rows, columns, *meeting(peers))
    return out
