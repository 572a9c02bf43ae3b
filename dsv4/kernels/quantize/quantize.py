"""The operand bytes of a quantised activation, as the FP4 tensor cores take them."""

from torch import Tensor

from dsv4.kernels.op import op
from dsv4.kernels.quantize.kernel import launch_codes
from dsv4.kernels.quantize.quantize_ref import quantize_ref


@op("quantize", ref=quantize_ref, shapes={"x": "* K : bf16 f32"})
def quantize(x: Tensor, *, out: tuple[Tensor, Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """NVFP4 of x [T, K] with one global per row: value = e2m1 * e4m3 * global, each row by itself.

    x [..., K] bf16|f32, K a multiple of 16, rows evenly apart -> codes [..., K/2] u8 (even column in the low nibble),
    scales [..., K/16] e4m3, globals [...] f32 (decode form). Bit for bit nvfp4.quantize(per_row=True). A row with NaN
    has a NaN for its global and all its scales, one with Inf an infinite global and a NaN for the scale of that group:
    both decode to NaN. The codes of a group whose scale is NaN are arbitrary. One launch.
    """
    return launch_codes("quantize", x, out)
