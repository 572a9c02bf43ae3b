"""A cache that looks as if long sequences had been read: seeded random entries instead of a prefill."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsv4.errors import RequestError
from dsv4.kvcache import KVCache
from dsv4.quant import kv

_ROWS = 1 << 16  # entries made at a time: 128 MB in float32 at the sizes of V4


def fill_context(cache: KVCache, sequences: int, length: int, *, room: int, seed: int = 0) -> list[int]:
    """Slots of `sequences` new sequences of `length` tokens each; pages for `room` tokens more are already held.

    Every ring, pool and state holds finite values of standard deviation 1, entries and index keys rounded (and packed)
    as the cache keeps them. The same seed gives the same contents on devices of one type.
    """
    if length < 1 or room < 0:
        raise RequestError(f"a context needs length >= 1 and room >= 0 tokens, got {length} and {room}")
    slots = [cache.acquire() for _ in range(sequences)]
    cache.reserve([(slot, length + room) for slot in slots])
    source = torch.Generator(cache.device).manual_seed(seed)
    config = cache.config
    for layer in cache.layers:
        for name, buffer in vars(layer).items():
            width = config.index_head_dim if name.startswith("index") else config.head_dim
            _fill(buffer, width, config.qk_rope_head_dim, name == "index_pool", source)
    for slot in slots:
        cache.advance(slot, length)
    return slots


def _fill(buffer: Tensor, width: int, rope_dims: int, is_key: bool, source: torch.Generator) -> None:
    """buffer [..., width] of floats, or u8 [..., X] packed, is overwritten in place."""
    if buffer.dtype != torch.uint8:
        buffer.normal_(generator=source)
        return
    pack: Callable[[Tensor], Tensor] = kv.pack_index_key if is_key else lambda x: kv.pack_entry(x, rope_dims)
    rows = buffer.view(-1, buffer.shape[-1])
    for part in rows.split(_ROWS):
        part.copy_(pack(torch.randn(len(part), width, generator=source, device=buffer.device)))
