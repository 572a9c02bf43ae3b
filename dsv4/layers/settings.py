"""The numeric settings every layer is built with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv4.config import ModelConfig
from dsv4.errors import ConfigError
from dsv4.parallel.mesh import Mesh
from dsv4.quant.activations import ACTS, Act

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Settings:
    """dtype: of everything between ops. act: how linear inputs are quantised. kv_quant, index_quant: the roundings the
    model was trained with, FP8 of KV entries and Hadamard + FP4 of index queries and keys. tp: the ranks that share
    the model; with them wo_b and the experts give partial sums in float32, which are rounded once they are added up.
    """

    dtype: torch.dtype
    act: Act
    kv_quant: bool
    index_quant: bool
    tp: Mesh | None = None

    @staticmethod
    def parse(
        config: ModelConfig, dtype: str, act: str, kv_quant: bool, index_quant: bool, tp: Mesh | None = None
    ) -> Settings:
        """Check the flags, and that the model's sizes allow the trained-in quantisation (groups of 64, Hadamard of
        2^n).
        """
        if dtype not in DTYPES:
            raise ConfigError(f"dtype '{dtype}' is not supported; choose one of {', '.join(DTYPES)}")
        if act not in ACTS:
            raise ConfigError(f"act '{act}' is not supported; choose one of {', '.join(ACTS)}")
        plain = config.head_dim - config.qk_rope_head_dim
        if kv_quant and plain % 64:
            raise ConfigError(
                f"kv_quant rounds KV entries in groups of 64, but head_dim - qk_rope_head_dim = {plain} is not a "
                "multiple of 64; load with kv_quant=False"
            )
        n = config.index_head_dim
        if index_quant and any(s.kind == "csa" for s in config.layers) and (n & (n - 1) or n % 32):
            raise ConfigError(
                f"index_quant needs index_head_dim to be a power of two and a multiple of 32, got {n}; "
                "load with index_quant=False"
            )
        return Settings(DTYPES[dtype], act, kv_quant, index_quant, tp)


def check_device(device: str) -> None:
    """ConfigError for a device that torch does not know or this machine does not have."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as failure:
        reason = str(failure).splitlines()[0]
        raise ConfigError(f"device {device!r} cannot be used here ({reason}); use cpu") from failure
