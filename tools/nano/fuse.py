"""Functions of one pass over memory: with `fuse.on` they are compiled (torch.compile), each for few shapes; otherwise
they run as written.

Training nano is bound by elementwise traffic, not by its small products; compiling the whole model would take
minutes, these pieces take seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable)
on = False


def fused(function: F) -> F:
    compiled = torch.compile(function, dynamic=False, fullgraph=True)

    @functools.wraps(function)
    def call(*args, **kwargs):
        return (compiled if on else function)(*args, **kwargs)

    return call  # type: ignore[return-value]


def enable() -> None:
    global on
    on = True
    torch._dynamo.config.recompile_limit = 64
