"""Rotary position embedding of the LAST `R` channels, adjacent pairs (2i, 2i+1)."""

from torch import Tensor

from dsv4.kernels.launch import dtype_code, heads_of, rotations, same_device
from dsv4.kernels.loader import Kernel
from dsv4.kernels.op import op
from dsv4.kernels.rope.rope_ref import rope_ref

_KERNEL = Kernel("rope", "ppqiiiqqqi")


@op("rope", ref=rope_ref, shapes={"x": "* N : bf16 f32"})
def rope(x: Tensor, cis: Tensor) -> Tensor:
    """(a, b) -> (a cos - b sin, a sin + b cos) on the last R = 2 * cis.shape[-1] channels, IN PLACE; returns x.

    x [T, N] or [T, H, N] bf16|f32; cis [T, R/2] complex64 = cos + i sin of position * frequency (float32 product), its
    conjugate to rotate back. float32 inside, one rounding to x's dtype; the first N - R channels stay as they are.
    """
    rows, heads, n = (view := heads_of("rope", "x", x)).shape
    cis_stride = rotations("rope", cis, rows, n)
    same_device("rope", x.device, cis=cis)
    strides = view.stride(0), view.stride(1), cis_stride
    _KERNEL(x.device, x, cis, rows, heads, n, 2 * cis.shape[1], *strides, dtype_code("rope", "x", x))
    return x
