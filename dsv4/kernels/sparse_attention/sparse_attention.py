"""Core attention: window entries and selected compressed entries under one softmax with a sink, un-rotated."""

import functools

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.launch import bf16_only, contiguous, device_sizes, result, rotations, same_device
from dsv4.kernels.loader import Kernel
from dsv4.kernels.op import op
from dsv4.kernels.sparse_attention.sparse_attention_ref import sparse_attention_ref
from dsv4.quant.kv import entry_bytes

_KERNEL = Kernel("sparse_attention", "ppppppppppqqqqqiiiiiiiff")
HEAD_DIM, ROPE_DIMS, WINDOW = 512, 64, 128  # of V4: what the kernel and its packed entries are written for
SPLIT_ROWS = 64  # calls of up to this many rows, every decode step among them, add a row's entries up as 8 splits
SPLITS, CHUNKS = 8, 4  # of attention_few.cuh
STAGE, SMALL_STAGE = 80, 32  # entries of a split that a block works on at once
ROOM = 220 << 10  # bytes of shared memory for the former
CLUSTERS, CLUSTER_HEADS = 12, 16  # an H200 does not find room for 16 clusters of 8 blocks at once


@op("sparse_attention", ref=sparse_attention_ref, shapes={"q": "T H N : bf16 f32", "local": "* X : bf16 f32 u8"})
def sparse_attention(
    q: Tensor,
    local: Tensor,
    local_rows: Tensor,
    pool: Tensor | None,
    pool_rows: Tensor | None,
    sink: Tensor,
    cis: Tensor,
    *,
    scale: float,
    turn: Tensor | None = None,
    eps: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """softmax over (window | compressed | sink), times the entries, then the inverse RoPE of the query's position.

    q [T, H, Dh]; local [..., Dh] holds the window's entries (the ring, or this chunk and what preceded it), local_rows
    [T, W] i64 rows of it; pool [P, 64, Dh] pages of compressed entries, pool_rows [T, E] i64; -1 = nothing there.
    Either may be u8 [..., X] packed entries instead (dsv4/quant/kv.py). sink [H] f32 is a logit that takes probability
    and adds nothing. scale = Dh^-0.5; cis [T, R/2] complex64, conjugated: it rotates back. -> [T, H, Dh] in q's dtype.
    With turn [T, R/2] complex64, q is as `wq_b` leaves it: q_norm_rope(q, turn, eps) comes first.
    Logits and sums float32; unnormalised probabilities are rounded to q's dtype before they multiply the entries, as in
    DeepSeek's kernel. A row with nothing visible returns zeros.

    On a GPU: BF16, Dh = 512. A probability is rounded relative to the largest logit known by then, in the
    twin relative to the row's largest: either way by at most 2^-8 of itself. A row's bits depend neither on the other
    rows nor on how wide the row lists are, and on T only in that T <= 64 (one way for all) and T > 64 (another) add up
    in different orders.
    """
    rows, heads, width = q.shape
    _supported(q, cis)
    contiguous("sparse_attention", q=q, local=local, pool=pool, sink=sink)
    same_device(
        "sparse_attention",
        q.device,
        local=local,
        local_rows=local_rows,
        pool=pool,
        pool_rows=pool_rows,
        sink=sink,
        cis=cis,
        turn=turn,
    )
    if sink.shape != (heads,) or sink.dtype != torch.float32:
        raise KernelError(f"sparse_attention: 'sink' is {list(sink.shape)} {sink.dtype}; expected [{heads}] float32")
    packed = _packed("local", local), pool is not None and _packed("pool", pool)
    if any(packed) and 2 * cis.shape[1] != ROPE_DIMS:
        raise KernelError(f"sparse_attention: packed entries turn {ROPE_DIMS} channels, 'cis' turns {2 * cis.shape[1]}")
    local_width, local_stride = _row_list("local_rows", local_rows, rows)
    pool_width, pool_stride = (0, 0) if pool is None or pool_rows is None else _row_list("pool_rows", pool_rows, rows)
    cis_stride = rotations("sparse_attention", cis, rows, width)
    out = result("sparse_attention", out, (rows, heads, width), q.dtype, q.device)
    if pool_width == 0:
        pool = pool_rows = None
    turn_stride = 0 if turn is None else rotations("sparse_attention", turn, rows, width)
    if turn is not None and (turn.shape != cis.shape or 4 * turn.shape[1] > width):
        raise KernelError(
            f"sparse_attention: 'turn' is {list(turn.shape)}, 'cis' {list(cis.shape)}; expected the same, of at most "
            f"{width // 2} channels"
        )
    split = rows <= SPLIT_ROWS
    parts = _parts(rows, heads, (local_width, pool_width), q.device) if split else None
    strides = turn_stride, local_stride, pool_stride, cis_stride
    sizes = heads, local_width, pool_width, packed[0], packed[1], 2 * cis.shape[1], split
    tensors = q, local, local_rows, pool, pool_rows, sink, cis, turn, out, parts
    _KERNEL(q.device, *tensors, rows, *strides, *sizes, scale, eps)
    return out


def longer(local_width: int, pool_width: int, stage: int = STAGE) -> bool:
    """Whether row lists have room for more than a stage of each split."""
    return max(-(-local_width // WINDOW), 1) * WINDOW + pool_width > SPLITS * stage


def _parts(rows: int, heads: int, widths: tuple[int, int], device: torch.device) -> Tensor | None:
    """Where blocks leave what they have of a row's splits; None where a cluster has all splits of 16 heads at once."""
    chunked = longer(*widths, _stage(device))
    if not chunked and rows * -(-heads // CLUSTER_HEADS) <= CLUSTERS:
        return None
    units = rows * -(-heads // 32) * SPLITS * (CHUNKS if chunked else 1)
    return torch.empty(units * 32 * (HEAD_DIM + 2), dtype=torch.float32, device=device)


@functools.cache
def _stage(device: torch.device) -> int:
    if device.type == "cpu":  # its launches are only noted
        return STAGE
    return STAGE if device_sizes(device)[1] >= ROOM else SMALL_STAGE


def _supported(q: Tensor, cis: Tensor) -> None:
    bf16_only("sparse_attention", "q", q)
    if q.shape[2] != HEAD_DIM:
        raise KernelError(
            f"sparse_attention: head_dim is {q.shape[2]} and the kernel is written for {HEAD_DIM}; run the twin "
            "(DSV4_REF=sparse_attention)"
        )


def _packed(arg: str, entries: Tensor) -> bool:
    """Whether `entries` [..., X] are packed bytes."""
    expected = entry_bytes(HEAD_DIM, ROPE_DIMS) if entries.dtype == torch.uint8 else HEAD_DIM
    if entries.shape[-1] != expected or entries.dtype not in (torch.uint8, torch.bfloat16):
        raise KernelError(
            f"sparse_attention: '{arg}' is {list(entries.shape)} {entries.dtype}; the kernel takes [..., {HEAD_DIM}] "
            f"torch.bfloat16 or [..., {entry_bytes(HEAD_DIM, ROPE_DIMS)}] torch.uint8 packed"
        )
    return entries.dtype == torch.uint8


def _row_list(arg: str, numbers: Tensor, rows: int) -> tuple[int, int]:
    """Width and row stride of [T, n] i64."""
    if numbers.dtype != torch.int64 or numbers.dim() != 2 or len(numbers) != rows:
        raise KernelError(
            f"sparse_attention: '{arg}' is {list(numbers.shape)} {numbers.dtype}; expected [{rows}, n] torch.int64"
        )
    if numbers.shape[1] > 1 and numbers.stride(1) != 1:
        raise KernelError(f"sparse_attention: '{arg}' has strides {list(numbers.stride())}; pass .contiguous()")
    return numbers.shape[1], numbers.stride(0)
