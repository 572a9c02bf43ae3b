"""A linear weight as stored: one class per format, logical shape [..., N, K]; stacked experts have shape [E, N, K]."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self, TypeVar

import torch
from torch import Tensor

from dsv4.errors import CheckpointError, KernelError
from dsv4.quant import fp8, mxfp4, nvfp4
from dsv4.quant.formats import check_finite, e4m3_decode, e8m0_decode

W = TypeVar("W", bound="Weight")


class Weight(ABC):
    """Base of the stored formats. Tensors are never changed after construction.

    shape  logical (..., N, K): N outputs, K inputs
    format "nvfp4" | "mxfp4" | "fp8" | "bf16" | "f32"
    """

    format: str
    shape: tuple[int, ...]
    #: Attribute names of the tensors, and how many (rows, columns) of the logical matrix one stored entry covers.
    #: None marks tensors with one entry per leading index.
    _steps: ClassVar[dict[str, tuple[int, int] | None]]

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by attribute name; an absent input_scale is left out."""
        found = {name: getattr(self, name) for name in self._steps}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors().values())).device

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.format}, shape={self.shape}, {self.nbytes} bytes, {self.device})"

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values [..., N, K] in `dtype`: exact in float64; in float32 and bfloat16 if all factors are powers of two.

        An NVFP4 global, or float32 FP8 factors, that are not powers of two round once in float32.
        """

    @abstractmethod
    def _floats(self) -> dict[str, Tensor]:
        """Every stored tensor that can hold NaN or Inf, decoded."""

    @abstractmethod
    def _with(self, tensors: dict[str, Tensor]) -> Self:
        """The same kind of weight around other tensors."""

    def check_finite(self, name: str) -> None:
        """Raise CheckpointError naming `name` when a stored scale or value is NaN or Inf. Synchronises."""
        for part, tensor in self._floats().items():
            check_finite(tensor, f"{name}.{part}", CheckpointError)

    def to(self, device: torch.device | str) -> Self:
        """The same weight on `device` (itself when it is there already)."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return self if all(moved[name] is t for name, t in self.tensors().items()) else self._with(moved)

    def select(self, index: int) -> Self:
        """Entry `index` of the first leading dimension, e.g. one expert: a view."""
        if len(self.shape) < 3:
            raise KernelError(f"cannot select entry {index} of a weight of shape {self.shape}; expected [E, N, K]")
        return self._with({name: tensor[index] for name, tensor in self.tensors().items()})

    def rows(self, start: int, stop: int) -> Self:
        """Output rows start..stop (exclusive) of every matrix: a view. FP8 bounds lie on multiples of its block."""
        return self._cut(-2, start, stop)

    def columns(self, start: int, stop: int) -> Self:
        """Input columns start..stop (exclusive) of every matrix: a view. Bounds lie on whole scale groups."""
        return self._cut(-1, start, stop)

    def _cut(self, dim: int, start: int, stop: int) -> Self:
        size = self.shape[dim]
        if not 0 <= start <= stop <= size:
            raise KernelError(f"cannot take {start}..{stop} of dimension {dim} of a weight of shape {self.shape}")
        cut = {}
        for name, tensor in self.tensors().items():
            steps = self._steps[name]
            if steps is None:
                cut[name] = tensor
                continue
            step = steps[dim]
            if start % step or (stop % step and stop != size):
                raise KernelError(
                    f"cannot cut {self.format} at {start}..{stop}: its {name} covers {step} entries at a time; "
                    f"use multiples of {step}"
                )
            cut[name] = tensor.narrow(dim, start // step, -(-stop // step) - start // step)
        return self._with(cut)


class NVFP4Weight(Weight):
    """codes uint8 [..., N, K/2], scale e4m3 [..., N, K/16], global_scale and (or None) input_scale float32 [...].

    Both globals are in decode form: they multiply. input_scale is the calibrated global of the activations.
    For a single matrix a global of shape (1,) is taken as ().
    """

    _steps: ClassVar = {"codes": (1, 2), "scale": (1, nvfp4.GROUP), "global_scale": None, "input_scale": None}

    def __init__(self, codes: Tensor, scale: Tensor, global_scale: Tensor, input_scale: Tensor | None = None) -> None:
        self.format = "nvfp4"
        self.codes = _bytes(codes, "codes")
        self.scale = scale
        lead = self.codes.shape[:-2]
        self.global_scale = _per_matrix(global_scale, lead, "global_scale")
        self.input_scale = None if input_scale is None else _per_matrix(input_scale, lead, "input_scale")
        self.shape = (*self.codes.shape[:-1], self.codes.shape[-1] * 2)
        _expect("NVFP4 scale", scale, torch.float8_e4m3fn, _grouped(self.shape, nvfp4.GROUP))

    @classmethod
    def quantize(cls, x: Tensor, *, name: str = "weight") -> NVFP4Weight:
        """Quantise x [..., N, K], one global per matrix. Raises KernelError naming `name` on NaN or Inf."""
        return cls(*nvfp4.quantize(x, check=True, name=name))

    @classmethod
    def from_mxfp4(cls, weight: MXFP4Weight, k_max: Tensor | int | None = None) -> tuple[NVFP4Weight, bool]:
        """Recast an MXFP4 weight; the bool says whether every value stayed the same (nvfp4.from_mxfp4)."""
        codes, scale, global_scale, exact = nvfp4.from_mxfp4(weight.codes, weight.scale, k_max)
        return cls(codes, scale, global_scale), exact

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return nvfp4.dequantize(self.codes, self.scale, self.global_scale, dtype)

    def _floats(self) -> dict[str, Tensor]:
        globals_ = {name: t for name, t in self.tensors().items() if t.dtype == torch.float32}
        return {"scale": e4m3_decode(self.scale), **globals_}

    def _with(self, tensors: dict[str, Tensor]) -> NVFP4Weight:
        return type(self)(**tensors)


class MXFP4Weight(Weight):
    """codes uint8 [..., N, K/2], scale E8M0 bytes uint8 [..., N, K/32]."""

    _steps: ClassVar = {"codes": (1, 2), "scale": (1, mxfp4.GROUP)}

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.format = "mxfp4"
        self.codes = _bytes(codes, "codes")
        self.scale = _bytes(scale, "scale")
        self.shape = (*self.codes.shape[:-1], self.codes.shape[-1] * 2)
        _expect("MXFP4 scale", self.scale, torch.uint8, _grouped(self.shape, mxfp4.GROUP))

    @classmethod
    def quantize(cls, x: Tensor, *, name: str = "weight") -> MXFP4Weight:
        """Quantise x [..., N, K]. Raises KernelError naming `name` on NaN or Inf."""
        return cls(*mxfp4.quantize(x, name=name))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return mxfp4.dequantize(self.codes, self.scale, dtype)

    def _floats(self) -> dict[str, Tensor]:
        return {"scale": e8m0_decode(self.scale)}

    def _with(self, tensors: dict[str, Tensor]) -> MXFP4Weight:
        return type(self)(**tensors)


class FP8Weight(Weight):
    """data e4m3 [..., N, K], scale [..., ceil(N/128), ceil(K/128)]: E8M0 bytes uint8, or float32 factors."""

    _steps: ClassVar = {"data": (1, 1), "scale": (fp8.BLOCK, fp8.BLOCK)}
    block = (fp8.BLOCK, fp8.BLOCK)

    def __init__(self, data: Tensor, scale: Tensor) -> None:
        self.format = "fp8"
        self.data = data
        self.scale = scale if scale.dtype == torch.float32 else _bytes(scale, "scale")
        self.shape = tuple(data.shape)
        _expect("FP8 data", data, torch.float8_e4m3fn, self.shape)
        blocks = (*self.shape[:-2], -(-self.shape[-2] // fp8.BLOCK), -(-self.shape[-1] // fp8.BLOCK))
        _expect("FP8 scale", self.scale, self.scale.dtype, blocks)

    @classmethod
    def quantize(cls, x: Tensor, *, name: str = "weight") -> FP8Weight:
        """Quantise x [..., N, K] in 128x128 blocks. Raises KernelError naming `name` on NaN or Inf."""
        return cls(*fp8.quantize_block(x, name=name))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return fp8.dequantize_block(self.data, self.scale, fp8.BLOCK, dtype)

    def _floats(self) -> dict[str, Tensor]:
        scale = self.scale if self.scale.dtype == torch.float32 else e8m0_decode(self.scale)
        return {"scale": scale, "data": e4m3_decode(self.data)}

    def _with(self, tensors: dict[str, Tensor]) -> FP8Weight:
        return type(self)(**tensors)


class PlainWeight(Weight):
    """data [..., N, K] bfloat16 ("bf16") or float32 ("f32")."""

    _steps: ClassVar = {"data": (1, 1)}
    _formats: ClassVar[dict[torch.dtype, str]] = {torch.bfloat16: "bf16", torch.float32: "f32"}

    def __init__(self, data: Tensor) -> None:
        if data.dtype not in self._formats:
            raise CheckpointError(f"plain weight is {data.dtype}; expected bfloat16 or float32")
        self.format = self._formats[data.dtype]
        self.data = data
        self.shape = tuple(data.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.data.to(dtype)

    def _floats(self) -> dict[str, Tensor]:
        return {"data": self.data}

    def _with(self, tensors: dict[str, Tensor]) -> PlainWeight:
        return type(self)(**tensors)


def stack(weights: Sequence[W]) -> W:
    """Stack weights [N, K] of one format and shape into one [E, N, K]; the tensors are copied."""
    parts = [weight.tensors() for weight in weights]
    kinds = {(type(w), w.format, w.shape, tuple(p)) for w, p in zip(weights, parts, strict=True)}
    if len(kinds) != 1:
        found = sorted(f"{w.format} {w.shape}" for w in weights)
        raise CheckpointError(f"cannot stack {found}; expected one or more weights of one format, shape and tensor set")
    return weights[0]._with({name: torch.stack([part[name] for part in parts]) for name in parts[0]})


def _bytes(tensor: Tensor, name: str) -> Tensor:
    if tensor.element_size() != 1:
        raise CheckpointError(f"{name} is {tensor.dtype}; expected one-byte entries")
    return tensor.view(torch.uint8)


def _per_matrix(tensor: Tensor, lead: torch.Size, name: str) -> Tensor:
    if tensor.shape == (1,) and not lead:
        tensor = tensor.reshape(())
    _expect(f"NVFP4 {name}", tensor, torch.float32, tuple(lead))
    return tensor


def _grouped(shape: tuple[int, ...], group: int) -> tuple[int, ...]:
    if shape[-1] % group:
        raise CheckpointError(
            f"weight of logical shape {shape} has {shape[-1]} columns; expected a multiple of {group}"
        )
    return (*shape[:-1], shape[-1] // group)


def _expect(what: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise CheckpointError(f"{what} is {tensor.dtype} {tuple(tensor.shape)}; expected {dtype} {shape}")
