"""Named access to a checkpoint's tensors below a prefix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dsv4.errors import CheckpointError
from dsv4.quant.weights import Weight


@dataclass(frozen=True)
class Scope:
    """`weights[prefix + name]`: a linear's Weight by module path, any other tensor by its full name.

    What is taken leaves `weights`: once a layer has put it into the form it computes with, the stored form may go, so
    that a model needs its own size and a layer's while it is made, not twice its size.
    """

    weights: dict[str, Weight | Tensor]
    prefix: str = ""

    def at(self, name: str) -> Scope:
        return Scope(self.weights, f"{self.prefix}{name}.")

    def weight(self, name: str) -> Weight:
        found = self._get(name)
        if not isinstance(found, Weight):
            raise CheckpointError(f"'{self.prefix}{name}' should be a linear weight, found a plain tensor")
        return found

    def f32(self, name: str) -> Tensor:
        """A parameter in float32 (BF16 values are exact in it)."""
        return self.tensor(name).float()

    def tensor(self, name: str) -> Tensor:
        found = self._get(name)
        if not isinstance(found, Tensor):
            raise CheckpointError(f"'{self.prefix}{name}' should be a tensor, found a {found.format} linear weight")
        return found

    def has(self, name: str) -> bool:
        return self.prefix + name in self.weights

    def _get(self, name: str) -> Weight | Tensor:
        try:
            return self.weights.pop(self.prefix + name)
        except KeyError:
            raise CheckpointError(f"the checkpoint has no '{self.prefix}{name}', which this layer needs") from None
