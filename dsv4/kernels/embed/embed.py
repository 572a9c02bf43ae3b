"""From token ids to the residual streams."""

from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.embed.embed_ref import embed_ref
from dsv4.kernels.launch import contiguous, result, same_device
from dsv4.kernels.loader import Kernel
from dsv4.kernels.op import op

_KERNEL = Kernel("embed", "pppqqii")


@op("embed", ref=embed_ref, shapes={"tokens": "T : i64", "table": "V D : bf16 f32"})
def embed(tokens: Tensor, table: Tensor, streams: int, *, out: Tensor | None = None) -> Tensor:
    """tokens [T] i64, table [V, D] bf16|f32 -> h [T, M, D] in table's dtype: the token's row, M = `streams` times.

    Token -1 is a padding row and gives zeros. On a GPU any other id outside the vocabulary gives a row of NaN, which
    ends as a token -1 of `sample`: the step goes on, and that request alone stops. On a CPU it is an error.
    """
    contiguous("embed", tokens=tokens, table=table)
    same_device("embed", tokens.device, table=table)
    if streams < 1:
        raise KernelError(f"embed: streams = {streams}; at least 1")
    (rows,), (vocab, width) = tokens.shape, table.shape
    out = result("embed", out, (rows, streams, width), table.dtype, table.device)
    _KERNEL(tokens.device, tokens, table, out, rows, vocab, width * table.element_size(), streams)
    return out
