"""From single stored weights to what the layers want: experts stacked and, under the policy "nvfp4", all NVFP4."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.errors import CheckpointError
from dsv4.quant import nvfp4
from dsv4.quant.weights import MXFP4Weight, NVFP4Weight, Weight


@dataclass(frozen=True)
class Conversion:
    """What became of one weight. exact: every value is the same number. error: ||W' - W|| / ||W||, Frobenius."""

    name: str
    before: str
    after: str
    exact: bool
    error: float


class Stack:
    """Experts put one by one into preallocated tensors [E, ...], so that a stack never exists twice in memory."""

    def __init__(self, experts: int, device: torch.device | str) -> None:
        self._experts = experts
        self._device = device
        self._kind: type[Weight] | None = None
        self._buffers: dict[str, Tensor] = {}
        self._filled: dict[str, int] = {}

    def put(self, expert: int, weight: Weight) -> None:
        """Copies `weight` [N, K] to place `expert`; all weights of a stack have one class, shape and dtypes."""
        self._kind = self._kind or type(weight)
        for part, tensor in weight.tensors().items():
            if part not in self._filled:
                shape = (self._experts, *tensor.shape)
                self._buffers[part] = torch.empty(shape, dtype=tensor.dtype, device=self._device)
            target = self._buffers[part]
            assert type(weight) is self._kind and tensor.dtype == target.dtype, "the plan admits one format per stack"
            target[expert].copy_(tensor)
            self._filled[part] = self._filled.get(part, 0) + 1

    def weight(self) -> Weight:
        """The stack [E, N, K]. An input_scale that only some experts have is dropped: activations set their own."""
        assert self._kind is not None
        complete = {part: t for part, t in self._buffers.items() if self._filled[part] == self._experts}
        return self._kind(**complete)


def place(weight: Weight, device: torch.device | str) -> Weight:
    """A copy of `weight` on `device` that no longer refers to the mapped file."""
    return type(weight)(**{part: tensor.to(device, copy=True) for part, tensor in weight.tensors().items()})


def to_nvfp4(weights: dict[str, Weight]) -> tuple[dict[str, NVFP4Weight], list[Conversion]]:
    """NVFP4 of `weights` [N, K] by name, which will share one global (w1 and w3 of an expert; else a single one).

    MXFP4 is recast with all codes kept (exact while its exponents span at most 17 octaves, NVFP4.md 4.2), everything
    else is dequantised and rounded anew; what is NVFP4 already stays. Raises CheckpointError if K is no multiple of 16.
    """
    ready = {name: w for name, w in weights.items() if isinstance(w, NVFP4Weight)}
    rest = {name: w for name, w in weights.items() if name not in ready}
    for name, weight in rest.items():
        if weight.shape[-1] % nvfp4.GROUP:
            raise CheckpointError(
                f"{name}: K = {weight.shape[-1]} is not a multiple of {nvfp4.GROUP}, so it cannot become NVFP4; "
                "keep the weights as stored (weights='native')"
            )
    mxfp4 = {name: w for name, w in rest.items() if isinstance(w, MXFP4Weight)}
    made = _recast(mxfp4) if len(mxfp4) == len(rest) else _requantise(rest)
    made |= {name: (w, Conversion(name, w.format, w.format, True, 0.0)) for name, w in ready.items()}
    return {name: made[name][0] for name in weights}, [made[name][1] for name in weights]


def _recast(weights: dict[str, MXFP4Weight]) -> dict[str, tuple[NVFP4Weight, Conversion]]:
    k_max = max((int(nvfp4.mxfp4_exponents(w.codes, w.scale)[1]) for w in weights.values()), default=0)
    made = {}
    for name, weight in weights.items():
        cast, exact = NVFP4Weight.from_mxfp4(weight, k_max)
        error = 0.0 if exact else _error(weight.dequantize(), cast)
        made[name] = (cast, Conversion(name, weight.format, cast.format, exact, error))
    return made


def _requantise(weights: dict[str, Weight]) -> dict[str, tuple[NVFP4Weight, Conversion]]:
    values = {name: weight.dequantize() for name, weight in weights.items()}
    amax = torch.stack([x.abs().amax() for x in values.values()]).amax()
    global_scale = nvfp4.global_of(amax)
    made = {}
    for name, x in values.items():
        # One global, but a tensor of its own for each weight: safetensors refuses to store shared memory.
        rounded = NVFP4Weight(*nvfp4.quantize(x, global_scale=global_scale.clone()))
        error = _error(x, rounded)
        made[name] = (rounded, Conversion(name, weights[name].format, rounded.format, error == 0.0, error))
    return made


def _error(values: Tensor, after: NVFP4Weight) -> float:
    """||after - values|| / ||values||, 0 for a weight of zeros."""
    difference = (after.dequantize() - values).norm()
    return float(difference / values.norm()) if difference > 0 else 0.0
