"""Clamped SwiGLU, the activation of every expert."""

from torch import Tensor

from dsv4.kernels.launch import dtype_code, result, row_stride, same_device, same_dtype
from dsv4.kernels.loader import Kernel
from dsv4.kernels.op import op
from dsv4.kernels.swiglu.swiglu_ref import swiglu_ref

_KERNEL = Kernel("swiglu", "pppqiqqfi")


@op("swiglu", ref=swiglu_ref, shapes={"gate": "T F : bf16 f32", "up": "T F : bf16 f32"})
def swiglu(gate: Tensor, up: Tensor, limit: float, *, out: Tensor | None = None) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit) in float32, rounded once; limit 0 (swiglu_limit): no clamp.

    gate, up [T, F] bf16|f32 -> [T, F] in their dtype.
    """
    same_dtype("swiglu", "gate", gate, "up", up)
    same_device("swiglu", gate.device, up=up)
    out = result("swiglu", out, tuple(gate.shape), gate.dtype, gate.device)
    strides = row_stride("swiglu", "gate", gate), row_stride("swiglu", "up", up)
    _KERNEL(gate.device, gate, up, out, *gate.shape, *strides, limit, dtype_code("swiglu", "gate", gate))
    return out
