"""humming-kernels as a peer of tools/bench_peer_kernels.py: NVFP4 weights, BF16 inputs, dense and indexed by expert."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.quant.weights import NVFP4Weight

Call = Callable[[], Tensor]


class Humming:
    """humming-kernels: a layer per weight (its README), compiled at run time for the batches asked for only."""

    name = "humming"
    package = "humming-kernels"

    def __init__(self) -> None:
        try:
            import humming.layer
            import humming.ops.utils

            humming.ops.utils.init_humming_launcher()
        except (ImportError, OSError, RuntimeError) as missing:
            raise KernelError(
                f"humming-kernels cannot be imported ({type(missing).__name__}: {missing}); nothing was measured. "
                "Install what is missing, e.g. pip install humming-kernels==0.1.19 (its needs: torch, triton, jinja2, "
                "cuda-bindings, filelock, tabulate, tqdm; and a CUDA toolkit with nvcc or NVRTC at run time)"
            ) from missing
        self.version = importlib.metadata.version(self.package)
        self.pool = ThreadPoolExecutor()
        self.jobs: list[Future[Any]] = []
        try:
            self._repack()
        except Exception:  # NVRTC, its own choice, is not there or lacks its headers
            os.environ.setdefault("HUMMING_COMPILER", "nvcc")

    def ready(self) -> None:
        wait(self.jobs)

    def linear(self, weight: NVFP4Weight, batches: Sequence[int]) -> Callable[[Tensor], Call]:
        layer = self._layer(weight)
        how, compiled = self._compile(layer, "dense", batches)

        def bind(x: Tensor) -> Call:
            compiled.result()
            return lambda: layer(x, **how)

        return bind

    def experts(
        self, w13: NVFP4Weight, w2: NVFP4Weight, topk: int, limit: float, batches: Sequence[int]
    ) -> Callable[[Tensor, Tensor], Call]:
        from humming.forward import may_process_input
        from humming.testing.data import generate_moe_tensors

        first, second = self._layer(w13), self._layer(w2)
        pairs = [batch * topk for batch in batches]  # by these it chooses
        compiled = [self._compile(layer, "indexed", pairs) for layer in (first, second)]
        gate, up = f"fminf(a, {limit}f)", f"fmaxf(fminf(b, {limit}f), -{limit}f)"
        swiglu = {"activation_type": "binary_split", "activation_impl": f"{gate} / (1.0f + __expf(-{gate})) * {up}"}

        def aligned(ids: Tensor, how: dict[str, str]) -> dict[str, Any]:
            """How to call a layer for this routing: its blocks of pairs that share an expert."""
            choices = json.loads(how["tuning_config"])
            rows = next(choice["block_shape"][0] for low, high, choice in choices if low < ids.numel() <= high)
            blocks = generate_moe_tensors(ids.int().cpu(), w13.shape[0], "indexed", rows)[2:]
            names = ("sorted_ids", "expert_ids", "num_tokens_padded")
            return how | {name: block.to(ids.device) for name, block in zip(names, blocks, strict=True)}

        def bind(x: Tensor, ids: Tensor) -> Call:
            for _, job in compiled:
                job.result()
            one, two = (aligned(ids, how) for how, _ in compiled)

            def call() -> Tensor:
                middle = may_process_input(second.humming_config, first(x, top_k=topk, **one), **swiglu)[0]
                return second(middle, top_k=1, **two)

            return call

        return bind

    def _repack(self) -> Any:
        """The kernel that every layer needs first."""
        from humming.kernel.repack_weight import RepackWeightKernel

        return RepackWeightKernel(weight_bits=4, activation_bits=16, is_weight_packed=True)

    def _layer(self, weight: NVFP4Weight) -> Any:
        from humming.layer import HummingLayer

        *experts, rows, columns = weight.shape
        with torch.device(weight.device):
            layer = HummingLayer(
                shape_n=rows,
                shape_k=columns,
                weight_config={"quant_method": "modelopt", "quant_algo": "nvfp4"},
                num_experts=experts[0] if experts else None,
                torch_dtype=torch.bfloat16,
            )
        scales = {"weight_scale": weight.scale, "weight_scale_2": weight.global_scale.reshape(-1)}
        layer.load_from_tensors({"weight": weight.codes, **scales})
        layer.transform()
        return layer

    def _compile(self, layer: Any, kind: str, rows: Sequence[int]) -> tuple[dict[str, str], Future[Any]]:
        """How to call a layer, with its own choice for each of these numbers of rows and no other; the compiling."""
        from humming.kernel.humming import HummingKernel
        from humming.tune import get_heuristics_config

        config, used = layer.humming_config, []  # (above, up to, choice): from nought on, else its launcher objects
        for row in sorted(rows):
            choice = get_heuristics_config(config, row, gemm_type=kind)
            if used and used[-1][2] == choice:
                used[-1][1] = row
            else:
                used.append([used[-1][1] if used else 0, row, choice])
        how = {"compute_config": json.dumps({"gemm_type": kind}), "tuning_config": json.dumps(used)}
        given = config.to_str(), *how.values(), layer.weight.device
        self.jobs.append(self.pool.submit(HummingKernel.prepare_kernels, *given))
        return how, self.jobs[-1]
