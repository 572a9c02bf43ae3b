"""compressed-tensors' NVFP4 layout (llm-compressor), known by its `weight_packed` and `weight_global_scale`.

weight_packed U8 [N, K/2], weight_scale E4M3 [N, K/16], and two global factors in ENCODE form, 2688/amax: our decode
form is their reciprocal. They are met with shape [] and [1].
"""

from collections.abc import Mapping

from torch import Tensor

from dsv4.checkpoint.header import TensorEntry
from dsv4.checkpoint.layout import SCALAR, Layout, Part
from dsv4.quant import nvfp4
from dsv4.quant.weights import NVFP4Weight, Weight


class CompressedTensorsNVFP4(Layout):
    label = "NVFP4 (compressed-tensors)"
    group = nvfp4.GROUP

    def owns(self, found: Mapping[str, TensorEntry]) -> bool:
        return "weight_packed" in found or "weight_global_scale" in found

    def parts(self, n: int, k: int, found: Mapping[str, TensorEntry]) -> dict[str, Part]:
        return {
            "weight_packed": Part(("U8", "I8"), ((n, k // 2),)),
            "weight_scale": Part(("F8_E4M3",), ((n, k // nvfp4.GROUP),)),
            "weight_global_scale": Part(("F32",), SCALAR),
            "input_global_scale": Part(("F32",), SCALAR, optional=True),
        }

    def decode(self, parts: Mapping[str, Tensor]) -> Weight:
        given = parts.get("input_global_scale")
        return NVFP4Weight(
            parts["weight_packed"],
            parts["weight_scale"],
            parts["weight_global_scale"].reciprocal(),
            None if given is None else given.reciprocal(),
        )

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        assert isinstance(weight, NVFP4Weight)
        stored = {
            "weight_packed": weight.codes,
            "weight_scale": weight.scale,
            "weight_global_scale": weight.global_scale.reciprocal().reshape(1),
        }
        if weight.input_scale is not None:
            stored["input_global_scale"] = weight.input_scale.reciprocal().reshape(1)
        return stored

    def signature(self, found: Mapping[str, TensorEntry]) -> str:
        return "nvfp4"


COMPRESSED_TENSORS = CompressedTensorsNVFP4()
