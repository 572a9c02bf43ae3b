"""From logits to the next token of every row."""

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.launch import contiguous, result, row_stride, same_device
from dsv4.kernels.loader import Kernel
from dsv4.kernels.op import op
from dsv4.kernels.sample.sample_ref import Forbidden, Penalties, sample_ref

__all__ = ["WIDEST", "Forbidden", "Penalties", "sample"]

WIDEST = 150_000  # V: a cluster of 8 blocks holds a row in what shared memory every target has
_KERNEL = Kernel("sample", "p" * 17 + "qqii")


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
    biased: Tensor | None = None,
    forbidden: Forbidden | None = None,
    penalties: Penalties | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One token per row, in this order: bias, forbidden tokens, penalties, temperature, top-k, top-p, min-p, draw.

    logits [B, V] f32; temperature [B] f32 (0 = the largest logit, ties to the lower id); seed, counter [B] i64
    top_k [B] i64: the k largest stay; 0 = off
    top_p [B] f32 in (0, 1]: of what top-k left, the smallest set in falling order whose mass reaches it; 1 = off
    min_p [B] f32 in [0, 1]: tokens at least this likely relative to the most likely one; 0 = off
    bias [B, V] f32: added first; -inf forbids a token; biased [B] bool: the rows it is for (None: all)
    forbidden: per row up to N ids that cannot come while the row's counter is below a number
    -> tokens [B] i64; -1 where a row of logits holds NaN or an infinity: the caller must stop that request

    None switches a filter off for every row. Filters are thresholds: what ties with the last one that stays, stays too,
    so a result never depends on the order of ids. A row's result depends on that row alone.
    The draw is the Gumbel maximum argmax(l - log E), E = -log1p(-u), u = ((h >> 32) + 1/2) 2^-32, at most 1 - 2^-24;
    h of token t is SplitMix64's mix(key + (t + 1) g), key = mix(mix(seed + g) + (counter + 1) g), modulo 2^64, with
    g = 0x9E3779B97F4A7C15. Against a walk along the cumulative sum it has one merit: a last-bit difference in the
    logits, such as another batch size brings, changes the token about as rarely as any method can.
    Reads B*V*4 bytes, twice that with bias, 5 more per element with penalties: on a GPU only in rows that have them
    (biased; a factor other than 1, 0, 0), so that full tensors cost the others nothing. One launch, without a host
    value that depends on the parameters. The mass of top-p is summed there in units of 2^-44, exactly: the set that
    stays differs from the twin's only where its mass is within V 2^-45 + 2^-22 of top_p.
    """
    rows, vocab = logits.shape
    if not 0 < vocab <= WIDEST:
        raise KernelError(f"sample: V = {vocab}; the kernel takes 1 to {WIDEST}")
    vectors = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "biased": biased}
    tables = {"bias": bias}
    stops = until = in_prompt = counts = repetition = presence = frequency = None
    if forbidden is not None:
        stops, until = forbidden
        vectors["until"] = until
        _check("forbidden.ids", stops, (rows, stops.shape[-1]), torch.int64)
    if penalties is not None:
        in_prompt, counts, repetition, presence, frequency = penalties
        vectors |= {"repetition": repetition, "presence": presence, "frequency": frequency}
        tables |= {"in_prompt": in_prompt, "counts": counts}
    for arg, x in vectors.items():
        _check(arg, x, (rows,), _DTYPES[arg])
    for arg, x in tables.items():
        _check(arg, x, (rows, vocab), _DTYPES[arg])
    contiguous("sample", temperature=temperature, seed=seed, counter=counter, stops=stops, **vectors, **tables)
    same_device("sample", logits.device, temperature=temperature, seed=seed, counter=counter, stops=stops)
    same_device("sample", logits.device, **vectors, **tables)
    out = result("sample", out, (rows,), torch.int64, logits.device)
    arguments = [temperature, seed, counter, top_k, top_p, min_p, bias, biased, in_prompt, counts]
    arguments += [repetition, presence, frequency, stops, until, out]
    width = 0 if stops is None else stops.shape[1]
    _KERNEL(logits.device, logits, *arguments, rows, row_stride("sample", "logits", logits), vocab, width)
    return out


_DTYPES = dict.fromkeys(["top_p", "min_p", "bias", "repetition", "presence", "frequency"], torch.float32)
_DTYPES |= {"top_k": torch.int64, "until": torch.int64, "counts": torch.int32}
_DTYPES |= dict.fromkeys(["biased", "in_prompt"], torch.bool)


def _check(arg: str, x: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if x is not None and (x.shape != shape or x.dtype != dtype):
        raise KernelError(f"sample: '{arg}' is {list(x.shape)} {x.dtype}; expected {list(shape)} {dtype}")
