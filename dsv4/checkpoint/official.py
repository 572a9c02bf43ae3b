"""DeepSeek's own layouts (SPEC 3.2): FP8 E4M3 in 128x128 blocks, MXFP4 experts, and plain BF16 or F32.

The block scale of FP8 is called `scale` by DeepSeek, `weight_scale_inv` by transformers and `weight_scale` by
compressed-tensors; all three multiply on decode.
"""

from collections.abc import Mapping

from torch import Tensor, float8_e8m0fnu, int8, uint8

from dsv4.checkpoint.header import TensorEntry
from dsv4.checkpoint.layout import BLOCK_SCALES, Layout, Part
from dsv4.quant import mxfp4
from dsv4.quant.weights import FP8Weight, MXFP4Weight, PlainWeight, Weight


class OfficialFP8(Layout):
    """weight F8_E4M3 [N, K], one scale [ceil(N/128), ceil(K/128)]: E8M0 in the releases, F32 in the Base models."""

    label = "FP8 128x128"

    def owns(self, found: Mapping[str, TensorEntry]) -> bool:
        return "weight" in found and found["weight"].dtype == "F8_E4M3"

    def parts(self, n: int, k: int, found: Mapping[str, TensorEntry]) -> dict[str, Part]:
        name = next((s for s in BLOCK_SCALES if s in found), "scale")
        rows, columns = FP8Weight.block
        scale = Part(("F8_E8M0", "F32"), ((-(-n // rows), -(-k // columns)),))
        return {"weight": Part(("F8_E4M3",), ((n, k),)), name: scale}

    def step(self, whole: int, stored: int) -> int:
        return 1 if stored == whole else FP8Weight.block[0]

    def decode(self, parts: Mapping[str, Tensor]) -> Weight:
        return FP8Weight(parts["weight"], next(parts[s] for s in BLOCK_SCALES if s in parts))

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        assert isinstance(weight, FP8Weight)
        scale = weight.scale
        return {"weight": weight.data, "scale": scale.view(float8_e8m0fnu) if scale.dtype == uint8 else scale}

    def signature(self, found: Mapping[str, TensorEntry]) -> str:
        return f"fp8 with {next(found[s].dtype for s in BLOCK_SCALES if s in found)} scales"


class OfficialMXFP4(Layout):
    """weight I8 (or U8) [N, K/2], two codes a byte, scale E8M0 [N, K/32]: the routed experts, of MTP blocks too."""

    label = "MXFP4"
    group = mxfp4.GROUP

    def owns(self, found: Mapping[str, TensorEntry]) -> bool:
        return "weight" in found and found["weight"].dtype in ("I8", "U8")

    def parts(self, n: int, k: int, found: Mapping[str, TensorEntry]) -> dict[str, Part]:
        return {
            "weight": Part(("I8", "U8"), ((n, k // 2),)),
            "scale": Part(("F8_E8M0", "U8"), ((n, k // mxfp4.GROUP),)),
        }

    def decode(self, parts: Mapping[str, Tensor]) -> Weight:
        return MXFP4Weight(parts["weight"], parts["scale"])

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        assert isinstance(weight, MXFP4Weight)
        return {"weight": weight.codes.view(int8), "scale": weight.scale.view(float8_e8m0fnu)}

    def signature(self, found: Mapping[str, TensorEntry]) -> str:
        return "mxfp4"


class Plain(Layout):
    """weight BF16 or F32 [N, K]."""

    label = "plain BF16/F32"

    def owns(self, found: Mapping[str, TensorEntry]) -> bool:
        return "weight" in found and found["weight"].dtype in ("BF16", "F32")

    def parts(self, n: int, k: int, found: Mapping[str, TensorEntry]) -> dict[str, Part]:
        return {"weight": Part(("BF16", "F32"), ((n, k),))}

    def decode(self, parts: Mapping[str, Tensor]) -> Weight:
        return PlainWeight(parts["weight"])

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        assert isinstance(weight, PlainWeight)
        return {"weight": weight.data}

    def signature(self, found: Mapping[str, TensorEntry]) -> str:
        return found["weight"].dtype.lower()


FP8 = OfficialFP8()
MXFP4 = OfficialMXFP4()
PLAIN = Plain()
