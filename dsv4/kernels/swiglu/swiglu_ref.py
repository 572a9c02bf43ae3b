"""Twin of swiglu."""

import torch
from torch import Tensor


def activated_ref(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """Before the rounding, in float32."""
    gate, up = gate.float(), up.float()
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return torch.nn.functional.silu(gate) * up


def swiglu_ref(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return activated_ref(gate, up, limit).to(gate.dtype)
