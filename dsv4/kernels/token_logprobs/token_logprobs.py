"""Log-probabilities of tokens, and of the most likely ones beside them."""

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.launch import contiguous, result, row_stride, same_device
from dsv4.kernels.loader import Kernel
from dsv4.kernels.op import op
from dsv4.kernels.sample.sample import WIDEST
from dsv4.kernels.token_logprobs.token_logprobs_ref import token_logprobs_ref

_KERNEL = Kernel("token_logprobs", "ppppppqqii")
_MOST = 1024


@op("token_logprobs", ref=token_logprobs_ref, shapes={"logits": "T V : f32", "tokens": "T : i64"})
def token_logprobs(
    logits: Tensor, tokens: Tensor, top: int, *, out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Natural-log probabilities of `tokens` and of the `top` most likely ones, from the logits as the model gave them.

    logits [T, V] f32; tokens [T] i64; 0 <= top <= V (on a GPU at most 1024)
    -> logprob [T] f32, rank [T] i64 (1 = most likely; ties share the better rank), top values [T, top] f32, top ids
    [T, top] i64, equal values in any order (on a GPU the lower id first)

    A token's own value is the same float as in the top list: the largest exactly when it was the greedy choice. A row
    with NaN or +inf gives NaN. Reads T*V*4 bytes.
    """
    rows, vocab = logits.shape
    if not 0 <= top <= min(vocab, _MOST) or vocab > WIDEST:
        raise KernelError(
            f"token_logprobs: top = {top} of V = {vocab}; the kernel takes top up to {_MOST} and V, V up to {WIDEST}. "
            "DSV4_REF=token_logprobs runs the twin"
        )
    contiguous("token_logprobs", tokens=tokens)
    same_device("token_logprobs", logits.device, tokens=tokens)
    given = out or (None, None, None, None)
    shapes = [
        ((rows,), torch.float32),
        ((rows,), torch.int64),
        ((rows, top), torch.float32),
        ((rows, top), torch.int64),
    ]
    made = [result("token_logprobs", to, *how, logits.device) for to, how in zip(given, shapes, strict=True)]
    logprob, rank, values, ids = made
    _KERNEL(logits.device, logits, tokens, *made, rows, row_stride("token_logprobs", "logits", logits), vocab, top)
    return logprob, rank, values, ids
