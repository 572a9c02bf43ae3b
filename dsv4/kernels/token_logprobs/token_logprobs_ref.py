"""Twin of token_logprobs."""

from torch import Tensor


def token_logprobs_ref(logits: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, tokens[:, None])
    values, ids = logprobs.topk(top, dim=-1)
    return chosen[:, 0], (logprobs > chosen).sum(-1) + 1, values, ids
