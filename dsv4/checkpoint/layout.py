"""What a way of storing one linear weight [N, K] is: which tensors ("parts") it has, and how they become a `Weight`.

Each layout is a table of parts and two functions, so one checker serves them all. official.py, modelopt.py and
compressed_tensors.py hold the layouts; which one a weight has is decided by its own parts, never by the config.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dsv4.checkpoint.header import TensorEntry
from dsv4.quant.weights import Weight

SCALAR = ((), (1,))  # both are met in the wild for a per-tensor factor
BLOCK_SCALES = ("scale", "weight_scale", "weight_scale_inv")
FACTORS = ("weight_scale_2", "input_scale", "weight_global_scale", "input_global_scale")
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Part:
    """One stored tensor of a linear: the safetensors dtypes and the shapes it may have."""

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    optional: bool = False


class Layout(ABC):
    """One way of storing a linear weight. label: for people."""

    label: ClassVar[str]
    group: ClassVar[int] = 1  # K must be a multiple

    @abstractmethod
    def owns(self, found: Mapping[str, TensorEntry]) -> bool:
        """Whether the parts `found` (by suffix: "weight", "scale", ...) say that the weight is stored this way."""

    @abstractmethod
    def parts(self, n: int, k: int, found: Mapping[str, TensorEntry]) -> dict[str, Part]:
        """The parts a weight of logical shape [n, k] must have, by suffix."""

    @abstractmethod
    def decode(self, parts: Mapping[str, Tensor]) -> Weight:
        """The weight held by the stored tensors, without changing a bit of codes and scales."""

    @abstractmethod
    def encode(self, weight: Weight) -> dict[str, Tensor]:
        """The tensors to store for `weight`, by suffix; inverse of `decode`."""

    @abstractmethod
    def signature(self, found: Mapping[str, TensorEntry]) -> str:
        """What must be equal between the experts of one stack: the format, and the dtype where a format has two."""

    def step(self, whole: int, stored: int) -> int:
        """How many logical entries of a dimension one stored entry covers, where `stored` are there for `whole`."""
        return whole // stored

    def header_faults(self, module: str, shape: tuple[int, int], found: Mapping[str, TensorEntry]) -> list[str]:
        """What is wrong with the parts by their header alone: missing, unexpected, wrong dtype, wrong shape."""
        n, k = shape
        if k % self.group:
            return [f"{module}: {self.label} needs K to be a multiple of {self.group}; the config says {k}"]
        wanted = self.parts(n, k, found)
        faults = []
        for suffix, part in wanted.items():
            if suffix in found:
                faults += entry_faults(found[suffix], part.dtypes, part.shapes)
            elif not part.optional:
                faults.append(
                    f"{module}.{suffix}: missing; {self.label} needs {_either(part.dtypes)} {_either(part.shapes)}"
                )
        faults += [
            f"{found[suffix].name}: unexpected beside {self.label} (its parts are {', '.join(wanted)})"
            for suffix in found
            if suffix not in wanted
        ]
        return faults


def entry_faults(entry: TensorEntry, dtypes: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> list[str]:
    """Wrong dtype and wrong shape of one stored tensor, each with what was expected."""
    faults = []
    if entry.dtype not in dtypes:
        faults.append(f"{entry.name}: dtype {entry.dtype}, expected {_either(dtypes)}")
    if entry.shape not in shapes:
        faults.append(f"{entry.name}: shape {list(entry.shape)}, expected {_either(shapes)}")
    return faults


def value_faults(suffix: str, tensor: Tensor) -> list[str]:
    """What is wrong with the numbers of one part (or of a parameter, suffix ""): NaN, Inf, impossible scales.

    Each fault reads like "3 of 64 values are NaN or Inf, the first at [0, 5]".
    """
    if tensor.dtype == torch.uint8:  # E8M0, whose one NaN is 255, or codes, which are all finite
        return _count(tensor, lambda t: t == 255) if suffix in BLOCK_SCALES else []
    if tensor.dtype == torch.float8_e4m3fn:
        faults = _count(tensor, lambda t: (t.view(torch.uint8) & 0x7F) == 0x7F)
    else:
        faults = _count(tensor, lambda t: ~torch.isfinite(t))
    if suffix in FACTORS:
        faults += _count(tensor, lambda t: t <= 0, "are zero or negative")
    elif suffix in BLOCK_SCALES:  # no writer makes a negative one, so the bytes are not what they seem
        faults += _count(tensor, lambda t: t.float() < 0, "are negative")
    return faults


def _count(tensor: Tensor, bad: Callable[[Tensor], Tensor], what: str = "are NaN or Inf") -> list[str]:
    flat = tensor.reshape(-1)
    count, first = 0, -1
    for start in range(0, flat.numel(), _CHUNK):  # in pieces: the mask of a whole embedding would double the memory
        mask = bad(flat[start : start + _CHUNK])
        here = int(mask.sum())
        if here and first < 0:
            first = start + int(mask.nonzero()[0])
        count += here
    if not count:
        return []
    where = [int(i) for i in torch.unravel_index(torch.tensor(first), tensor.shape)] if tensor.ndim else []
    return [f"{count} of {flat.numel()} values {what}, the first at {where}"]


def _either(options: tuple[object, ...]) -> str:
    return " or ".join(str(list(o)) if isinstance(o, tuple) else str(o) for o in options)
