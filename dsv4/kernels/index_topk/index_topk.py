"""The lightning indexer: score every visible compressed entry and keep the best `topk`."""

from torch import Tensor

from dsv4.kernels.index_topk.index_topk_ref import index_topk_ref
from dsv4.kernels.op import no_kernel, op


@op("index_topk", ref=index_topk_ref, shapes={"q": "T H N : bf16 f32", "weights": "T H : bf16 f32"})
def index_topk(
    q: Tensor,
    weights: Tensor,
    keys: Tensor,
    pages: Tensor,
    sequence: Tensor,
    visible: Tensor,
    topk: int,
    order: str = "entry",
) -> Tensor:
    """score[t, e] = sum_h weights[t, h] * relu(q[t, h] . key[e]); the `topk` best visible entries of each row.

    q [T, Hi, Ci], weights [T, Hi] (already scaled), keys [N, 64, Ci] pages in q's dtype, or u8 [N, 64, X] packed FP4;
    pages [B, P] i64: each sequence's pages in order, -1 = none; sequence [T] i64: the sequence of each row, rising, -1:
    a padding row, which selects nothing; visible [T] i64: row t sees entries 0 .. visible-1, entry e being pool row
    pages[b, e // 64] * 64 + e % 64. -> [T, min(topk, 64 * P)] i64 pool rows, -1 behind them where fewer entries are
    visible. Scores are held in q's dtype (BF16 in the trained model); of equal scores the lower entry number wins.
    `order` of a row's result: "entry", rising entry numbers, so that with visible <= topk it is entries
    0 .. visible-1; "score", falling scores; "torch", falling scores with ties as torch.topk has them, as in DeepSeek's
    script (they may then depend on the number of entries).
    """
    raise no_kernel("index_topk")
