"""An activation quantised for a product whose operands are BF16."""

from torch import Tensor

from dsv4.kernels.op import op
from dsv4.kernels.quantize.kernel import launch_values
from dsv4.kernels.quantize.quantize_act_ref import quantize_act_ref
from dsv4.quant.activations import Treatment


@op("quantize_act", ref=quantize_act_ref, shapes={"x": "* K : bf16 f32"})
def quantize_act(
    x: Tensor, how: Treatment, *, out: tuple[Tensor, Tensor | None] | None = None
) -> tuple[Tensor, Tensor | None]:
    """x [..., K] bf16|f32 -> (values [..., K] bf16, row_scale [...] f32 or None): values * row_scale is treat(x, how).

    "nvfp4": values = e2m1 * e4m3, row_scale = the row's global. "fp8": E4M3 times the power of two of its group of 128
    columns, no row_scale. Both are exact in BF16. "none": x rounded to BF16. Rows evenly apart, columns too. One
    launch.
    """
    return launch_values("quantize_act", x, how, out)
