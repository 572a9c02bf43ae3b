"""What an op is: a contract, a plain PyTorch twin that defines it and, on CUDA tensors, one launch.

On a CPU tensor the op *is* its twin. On a CUDA tensor the kernel runs, unless `DSV4_REF` names the op (or is `all`):
that swaps the twin in, so a wrong answer is bisected to one op by name.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from dsv4.errors import KernelError

F = TypeVar("F", bound=Callable[..., Any])
_DTYPES = {
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "i64": torch.int64,
    "bool": torch.bool,
    "u8": torch.uint8,
}
REGISTRY: dict[str, Callable[..., Any]] = {}


def twins_on_cuda() -> frozenset[str]:
    """Names in `DSV4_REF`: ops whose twin runs on CUDA tensors too."""
    return frozenset(filter(None, os.environ.get("DSV4_REF", "").split(",")))


def op(name: str, *, ref: Callable[..., Any], shapes: dict[str, str]) -> Callable[[F], F]:
    """Make the decorated launcher an op with twin `ref`.

    `shapes` maps leading positional arguments, in order, to specs such as `"T M D : bf16 f32"`: dimension letters that
    must agree across arguments (an integer is literal, `*` is any number of leading dimensions), then the dtypes
    allowed. A launch is checked each time; a twin when it meets a new first argument, or fails: PyTorch itself refuses
    what does not fit. `out=` receives the result in place: a tensor, or a tuple of them for an op that returns several;
    a launcher that takes `out` writes it directly.
    """
    specs = [(arg, *_parse(spec)) for arg, spec in shapes.items()]

    def decorate(launch: F) -> F:
        seen: set[tuple[Any, ...]] = set()
        use_twin = {"all", name} & twins_on_cuda()
        writes_out = "out" in inspect.signature(launch).parameters

        @functools.wraps(launch)
        def call(*args: Any, out: Tensor | tuple[Tensor, ...] | None = None, **kwargs: Any) -> Any:
            first = args[0]
            if first.is_cuda and not use_twin:
                _check(name, specs, args)
                if writes_out:
                    return launch(*args, out=out, **kwargs)
                result = launch(*args, **kwargs)
            else:
                if (first.shape, first.dtype) not in seen:
                    _check(name, specs, args)
                    seen.add((first.shape, first.dtype))
                try:
                    result = ref(*args, **kwargs)
                except (RuntimeError, IndexError):
                    _check(name, specs, args)  # the same fault, in the words of the contract
                    raise
            return result if out is None else _into(out, result)

        REGISTRY[name] = call
        return cast(F, call)

    return decorate


def _into(out: Any, result: Any) -> Any:
    if isinstance(out, tuple):
        return tuple(to.copy_(value) for to, value in zip(out, result, strict=True))
    return out.copy_(result)


def _parse(spec: str) -> tuple[list[str], tuple[torch.dtype, ...]]:
    dims, _, dtypes = spec.partition(":")
    return dims.split(), tuple(_DTYPES[d] for d in dtypes.split())


def _check(name: str, specs: list[tuple[str, list[str], tuple[torch.dtype, ...]]], args: tuple[Any, ...]) -> None:
    sizes: dict[str, int] = {}
    for (arg, dims, dtypes), value in zip(specs, args, strict=False):
        if not isinstance(value, Tensor):
            raise KernelError(f"{name}: '{arg}' must be a tensor [{' '.join(dims)}], got {type(value).__name__}")
        shape = list(value.shape)
        letters = dims
        if dims[:1] == ["*"]:
            letters = dims[1:]
            shape = shape[len(shape) - len(letters) :]
        if len(shape) != len(letters):
            raise KernelError(f"{name}: '{arg}' must have shape [{' '.join(dims)}], got {list(value.shape)}")
        for letter, size in zip(letters, shape, strict=True):
            expected = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
            if size != expected:
                raise KernelError(
                    f"{name}: '{arg}' has {letter} = {size} where {letter} = {expected} was expected "
                    f"(shape {list(value.shape)}, contract [{' '.join(dims)}])"
                )
        if dtypes and value.dtype not in dtypes:
            raise KernelError(f"{name}: '{arg}' has dtype {value.dtype}, expected one of {', '.join(map(str, dtypes))}")
