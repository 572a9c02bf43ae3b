"""The lightning indexer: score every visible compressed entry and keep the best `topk`."""

from collections.abc import Sequence

from torch import Tensor

from dsv4.kernels.index_topk.index_topk_ref import index_topk_ref
from dsv4.kernels.op import no_kernel, op


@op("index_topk", ref=index_topk_ref, shapes={"q": "T H N : bf16 f32", "weights": "T H : bf16 f32"})
def index_topk(
    q: Tensor,
    weights: Tensor,
    keys: Tensor,
    entries: Tensor,
    visible: Tensor,
    segments: Sequence[tuple[int, int]],
    topk: int,
    torch_ties: bool = False,
) -> Tensor:
    """score[t, e] = sum_h weights[t, h] * relu(q[t, h] . key[e]); the `topk` best visible entries of each row.

    q [T, Hi, Ci], weights [T, Hi] (already scaled), keys [P, 64, Ci] pages, all in one dtype; entries [B, E] i64: pool
    row of entry e of sequence b; visible [T] i64: row t sees entries 0 .. visible-1; segments: rows first..last-1 of
    each sequence. -> [T, min(topk, E)] i64 pool rows, -1 where fewer entries are visible. Scores are held in q's dtype
    (BF16 in the trained model); equal scores: the lower entry number wins, or with
    `torch_ties` whichever `torch.topk` takes, as in DeepSeek's script (it may then depend on the number of columns).
    """
    raise no_kernel("index_topk")
