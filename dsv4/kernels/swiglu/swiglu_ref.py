"""Twin of swiglu."""

import torch
from torch import Tensor


def swiglu_ref(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    gate, up = gate.float(), up.float()
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return torch.nn.functional.silu(gate) * up
