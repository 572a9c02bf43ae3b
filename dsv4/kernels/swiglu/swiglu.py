"""Clamped SwiGLU, the activation of every expert."""

from torch import Tensor

from dsv4.kernels.op import no_kernel, op
from dsv4.kernels.swiglu.swiglu_ref import swiglu_ref


@op("swiglu", ref=swiglu_ref, shapes={"gate": "T F : bf16 f32", "up": "T F : bf16 f32"})
def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit) in float32; limit 0 means no clamp (swiglu_limit).

    gate, up [T, F] bf16|f32 -> [T, F] f32.
    """
    raise no_kernel("swiglu")
