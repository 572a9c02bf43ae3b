"""ModelOpt's NVFP4 layout, the one NVIDIA publishes DeepSeek-V4 in: a weight has it iff it has a `weight_scale_2`.

weight U8 [N, K/2], weight_scale E4M3 [N, K/16], weight_scale_2 F32 (multiplies on decode), input_scale F32 (likewise,
of the activations; absent in weight-only exports). Source: examples/deepseek/deepseek_v4 in NVIDIA/Model-Optimizer.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dsv4.checkpoint.header import TensorEntry
from dsv4.checkpoint.layout import SCALAR, Layout, Part
from dsv4.quant import nvfp4
from dsv4.quant.weights import NVFP4Weight, Weight


class ModelOptNVFP4(Layout):
    label = "NVFP4 (ModelOpt)"
    group = nvfp4.GROUP

    def owns(self, found: Mapping[str, TensorEntry]) -> bool:
        # The second half only names the fault better when weight_scale_2 is what is missing.
        return "weight_scale_2" in found or (
            "weight_scale" in found and "weight" in found and found["weight"].dtype in ("U8", "I8")
        )

    def parts(self, n: int, k: int, found: Mapping[str, TensorEntry]) -> dict[str, Part]:
        return {
            "weight": Part(("U8", "I8"), ((n, k // 2),)),
            "weight_scale": Part(("F8_E4M3",), ((n, k // nvfp4.GROUP),)),
            "weight_scale_2": Part(("F32",), SCALAR),
            "input_scale": Part(("F32",), SCALAR, optional=True),
        }

    def decode(self, parts: Mapping[str, Tensor]) -> Weight:
        return NVFP4Weight(parts["weight"], parts["weight_scale"], parts["weight_scale_2"], parts.get("input_scale"))

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        """A weight without an input_scale gets 1.0: block scales are then amax/6 of the activations themselves."""
        assert isinstance(weight, NVFP4Weight)
        given = weight.input_scale
        return {
            "weight": weight.codes,
            "weight_scale": weight.scale,
            "weight_scale_2": weight.global_scale,
            "input_scale": torch.ones((), dtype=torch.float32) if given is None else given,
        }

    def signature(self, found: Mapping[str, TensorEntry]) -> str:
        return "nvfp4"


MODELOPT = ModelOptNVFP4()
