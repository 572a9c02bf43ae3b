"""The lightning indexer: treat the queries, score every visible compressed entry and keep the best `topk`."""

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.index_query.index_query import index_query
from dsv4.kernels.index_topk.index_topk_ref import index_topk_ref
from dsv4.kernels.launch import contiguous, dtype_code, result, rotations, row_stride, same_device
from dsv4.kernels.loader import Kernel
from dsv4.kernels.op import op
from dsv4.quant.kv import index_key_bytes

_KERNEL = Kernel("index_topk", "pppppppppqqqqiiiiiiiiif")
WIDTH, PAGE, MOST_HEADS = 128, 64, 64  # index_head_dim of V4, entries of a page, index_n_heads at most
DECODE_ROWS, TOGETHER_ROWS = 64, 128  # up to here the kernel treats the queries itself: of any rows, of TOGETHER's
TOGETHER = 8192  # entries of the widest row that a cluster scores and selects from in one launch (index_select.cuh)
RANGE, CLUSTER = 32768, 8  # keys that a block selects from at most, and blocks of a row's cluster (index_select.cuh)
SCORE_BYTES = 1 << 26  # of scores held at a time: a prefill of many rows is done in slices


@op("index_topk", ref=index_topk_ref, shapes={"q": "T H N : bf16 f32", "cis": "T R", "weights": "T H : bf16 f32"})
def index_topk(
    q: Tensor,
    cis: Tensor,
    weights: Tensor,
    keys: Tensor,
    pages: Tensor,
    sequence: Tensor,
    visible: Tensor,
    topk: int,
    order: str = "entry",
    weight_scale: float = 1.0,
    *,
    quantize: bool,
    out: Tensor | None = None,
) -> Tensor:
    """score[t, e] = sum_h w[t, h] * relu(x[t, h] . key[e]) with x = index_query(q, cis, quantize); the `topk` best
    visible entries of each row.

    q [T, Hi, Ci] (indexer.wq_b's output); cis [T, R/2] complex64; weights [T, Hi], rounded to q's dtype, times
    weight_scale and rounded again, are w; keys [N, 64, Ci] pages in q's dtype, or u8 [N, 64, X] packed FP4; pages [B,
    P] i64: each sequence's pages in order, -1 = none; sequence [T] i64: the sequence of each row, rising, -1: a padding
    row, which selects nothing; visible [T] i64: row t sees entries 0 .. visible-1, entry e being pool row pages[b, e //
    64] * 64 + e % 64. -> [T, min(topk, 64 * P)] i64 pool rows, -1 behind them where fewer entries are visible. Scores
    are held in q's dtype (BF16 in the trained model); of equal scores the lower entry number wins.
    `order` of a row's result: "entry", rising entry numbers, so that with visible <= topk it is entries
    0 .. visible-1; "score", falling scores; "torch", falling scores with ties as torch.topk has them, as in DeepSeek's
    script (they may then depend on the number of entries).

    On a GPU: BF16, Ci = 128, Hi a multiple of 8 up to 64, order "entry". Up to 128 rows of 64 P <= 8192 entries: one
    launch. Up to 64 of more: two (scores, then selection). More rows: index_query, then two launches per slice of rows
    whose scores take 64 MiB. A row has at most 262,144 entries to select from. A row's result does not depend on the
    other rows. Rows that see no more than `topk` entries are not scored.
    """
    rows, heads, width = q.shape
    if q.dtype != torch.bfloat16 or order != "entry":
        raise KernelError(
            f"index_topk: q {q.dtype}, order '{order}'; the kernel takes torch.bfloat16 and 'entry'. float32 on a GPU "
            "runs through the twins: set DSV4_REF=index_topk, or DSV4_REF=all"
        )
    if width != WIDTH or heads > MOST_HEADS or heads % 8:
        raise KernelError(
            f"index_topk: {heads} heads of {width} channels; the kernel is written for {WIDTH} channels and 8, 16, .. "
            f"{MOST_HEADS} heads; run the twin (DSV4_REF=index_topk)"
        )
    packed = keys.dtype == torch.uint8
    expected = index_key_bytes(WIDTH) if packed else WIDTH
    if keys.dim() != 3 or keys.shape[1:] != (PAGE, expected) or keys.dtype not in (torch.uint8, torch.bfloat16):
        raise KernelError(
            f"index_topk: 'keys' is {list(keys.shape)} {keys.dtype}; the kernel takes [N, {PAGE}, {WIDTH}] "
            f"torch.bfloat16 or [N, {PAGE}, {index_key_bytes(WIDTH)}] torch.uint8 packed"
        )
    numbers = {"pages": (pages, 2), "sequence": (sequence, 1), "visible": (visible, 1)}
    for arg, (x, dims) in numbers.items():
        if x.dtype != torch.int64 or x.dim() != dims or (dims == 1 and len(x) != rows):
            raise KernelError(f"index_topk: '{arg}' is {list(x.shape)} {x.dtype} for {rows} rows; expected int64")
    contiguous("index_topk", q=q, keys=keys, pages=pages, sequence=sequence, visible=visible)
    others = {"cis": cis, "weights": weights, "keys": keys, "pages": pages, "sequence": sequence, "visible": visible}
    same_device("index_topk", q.device, **others)
    entries = PAGE * pages.shape[1]
    if entries > CLUSTER * RANGE:
        raise KernelError(
            f"index_topk: 'pages' has rows of {entries} entries; the kernel selects from {CLUSTER * RANGE}. Plan for "
            "shorter sequences, or run the twin (DSV4_REF=index_topk)"
        )
    picked = min(topk, entries)
    out = result("index_topk", out, (rows, picked), torch.int64, q.device)
    cis_stride, turned = rotations("index_topk", cis, rows, width), 2 * cis.shape[1]
    untreated: Tensor | None = cis
    scored = topk < entries
    treats = rows <= (TOGETHER_ROWS if entries <= TOGETHER else DECODE_ROWS)
    if scored and not treats:
        q, untreated = index_query(q, cis, quantize=quantize), None
    held = scored and (not treats or entries > TOGETHER)
    slice_rows = max(1, min(rows, SCORE_BYTES // (2 * entries))) if held else max(1, rows)
    scores = torch.empty((slice_rows, entries) if held else (8,), dtype=torch.bfloat16, device=q.device)
    tensors = q, untreated, weights, keys, pages, sequence, visible, scores, out
    strides = cis_stride, row_stride("index_topk", "weights", weights), slice_rows
    sizes = heads, turned, pages.shape[1], len(pages), topk, picked
    kinds = packed, dtype_code("index_topk", "weights", weights), quantize
    _KERNEL(q.device, *tensors, rows, *strides, *sizes, *kinds, weight_scale)
    return out
