"""Twin of advance."""

import torch
from torch import Tensor


def advance_ref(
    tokens: Tensor,
    slots: Tensor,
    inputs: Tensor,
    positions: Tensor,
    counters: Tensor,
    counts: Tensor,
    ring: Tensor,
    step: Tensor,
) -> None:
    line = ring[step % len(ring)][:, : len(tokens)]
    used = slots >= 0
    ring[step % len(ring), : len(tokens)] = torch.where(used, tokens, line)
    positions += used
    counters += used
    sampled = used & (tokens >= 0)
    inputs.copy_(torch.where(sampled, tokens, inputs))
    counts.scatter_add_(1, tokens.clamp_min(0)[:, None], sampled[:, None].to(counts.dtype))
    step += 1
