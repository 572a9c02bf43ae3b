"""The input of an expert's second projection, straight from the output of its first: SwiGLU and quantisation."""

from torch import Tensor

from dsv4.kernels.op import op
from dsv4.kernels.quantize.kernel import launch_values
from dsv4.kernels.quantize.swiglu_quantize_ref import swiglu_quantize_ref
from dsv4.quant.activations import Treatment


@op("swiglu_quantize", ref=swiglu_quantize_ref, shapes={"gate": "T F : bf16 f32", "up": "T F : bf16 f32"})
def swiglu_quantize(
    gate: Tensor,
    up: Tensor,
    weights: Tensor | None,
    how: Treatment,
    *,
    limit: float,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """quantize_act(bf16(swiglu(gate, up) * weights), how) in one launch.

    gate, up [T, F] bf16|f32, weights [T] f32 or None (the routing weight) -> (values [T, F] bf16, row_scale [T] f32 or
    None). The clamp of SwiGLU comes first, then the weight, one rounding to BF16, then the maxima: those of what is
    multiplied. gate and up may be halves of one tensor, or every other column of it.
    """
    return launch_values("swiglu_quantize", gate, how, out, up, weights, limit)
