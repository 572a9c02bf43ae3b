"""From logits to the next token of every row, and the log-probabilities of tokens."""

from torch import Tensor

from dsv4.kernels.op import no_kernel, op
from dsv4.kernels.sample.sample_ref import Penalties, sample_ref, token_logprobs_ref

__all__ = ["Penalties", "sample", "token_logprobs"]


@op(
    "sample",
    ref=sample_ref,
    shapes={"logits": "B V : f32", "temperature": "B : f32", "seed": "B : i64", "counter": "B : i64"},
)
def sample(
    logits: Tensor,
    temperature: Tensor,
    seed: Tensor,
    counter: Tensor,
    *,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    bias: Tensor | None = None,
    penalties: Penalties | None = None,
) -> Tensor:
    """One token per row, in this order: bias, penalties, temperature, top-k, top-p, min-p, draw.

    logits [B, V] f32; temperature [B] f32 (0 = the largest logit, ties to the lower id); seed, counter [B] i64
    top_k [B] i64: the k largest stay; 0 = off
    top_p [B] f32 in (0, 1]: of what top-k left, the smallest set in falling order whose mass reaches it; 1 = off
    min_p [B] f32 in [0, 1]: tokens at least this likely relative to the most likely one; 0 = off
    bias [B, V] f32: added first; -inf forbids a token
    -> tokens [B] i64; -1 where a row of logits holds NaN or an infinity: the caller must stop that request

    None switches a filter off for every row. Filters are thresholds: what ties with the last one that stays, stays too,
    so a result never depends on the order of ids. A row's result depends on that row alone.
    The draw is the Gumbel maximum argmax(l - log E), E = -log1p(-u), u = ((h >> 32) + 1/2) 2^-32, at most 1 - 2^-24;
    h of token t is SplitMix64's mix(key + (t + 1) g), key = mix(mix(seed + g) + (counter + 1) g), modulo 2^64, with
    g = 0x9E3779B97F4A7C15. Against a walk along the cumulative sum it has one merit: a last-bit difference in the
    logits, such as another batch size brings, changes the token about as rarely as any method can.
    Reads B*V*4 bytes (twice that with bias, 5 more per element with penalties).
    """
    raise no_kernel("sample")


@op("token_logprobs", ref=token_logprobs_ref, shapes={"logits": "T V : f32", "tokens": "T : i64"})
def token_logprobs(logits: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Natural-log probabilities of `tokens` and of the `top` most likely ones, from the logits as the model gave them.

    logits [T, V] f32; tokens [T] i64; 0 <= top <= V
    -> logprob [T] f32, rank [T] i64 (1 = most likely; ties share the better rank), top values [T, top] f32, top ids
    [T, top] i64

    A token's own value is the same float as in the top list: the largest exactly when it was the greedy choice.
    """
    raise no_kernel("token_logprobs")
