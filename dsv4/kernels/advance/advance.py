"""What a decode step does after it has sampled: the tokens become the next step's inputs, and everything counts on."""

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.advance.advance_ref import advance_ref
from dsv4.kernels.launch import contiguous, same_device
from dsv4.kernels.loader import Kernel
from dsv4.kernels.op import op

_KERNEL = Kernel("advance", "ppppppppiiqq")
_MOST_ROWS = 1024


@op(
    "advance",
    ref=advance_ref,
    shapes={
        "tokens": "B : i64",
        "slots": "B : i64",
        "inputs": "B : i64",
        "positions": "B : i64",
        "counters": "B : i64",
        "counts": "B V",
        "ring": "L C : i64",
        "step": "1 : i64",
    },
)
def advance(
    tokens: Tensor,
    slots: Tensor,
    inputs: Tensor,
    positions: Tensor,
    counters: Tensor,
    counts: Tensor,
    ring: Tensor,
    step: Tensor,
) -> None:
    """Update in place, for each row b whose slot is not negative, after `tokens` [B] i64 were sampled:

    ring[step % L, b] = token; positions[b] += 1; counters[b] += 1; and, unless the token is -1 (the row's logits were
    not finite), inputs[b] = token and counts[b, token] += 1. Then step += 1. Rows of slot -1 are inert.

    slots [B], inputs [B], positions [B], counters [B], step [1] i64; counts [B, V] i32; ring [L, C] i64, C >= B: the
    last L steps' tokens, for the host to read when it likes; on the device, or pinned memory of the host.
    """
    rows, (length, columns) = len(tokens), ring.shape
    if counts.dtype != torch.int32:
        raise KernelError(f"advance: 'counts' is {counts.dtype}; expected torch.int32")
    if columns < rows or rows > _MOST_ROWS or not length:
        raise KernelError(
            f"advance: 'ring' is {list(ring.shape)} for {rows} rows; it needs a column per row, at most {_MOST_ROWS}, "
            "and at least one line"
        )
    tensors = {"slots": slots, "inputs": inputs, "positions": positions, "counters": counters, "counts": counts}
    contiguous("advance", tokens=tokens, **tensors, ring=ring, step=step)
    same_device("advance", tokens.device, **tensors, step=step)
    if ring.device != tokens.device and not ring.is_pinned():
        raise KernelError(f"advance: 'ring' is on {ring.device}, not pinned; expected {tokens.device} or pinned memory")
    vocab = counts.shape[1]
    _KERNEL(tokens.device, tokens, *tensors.values(), ring, step, rows, columns, vocab, length)
