"""A small model in every layout, and ways to spoil its files."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dsv4.config.releases import TINY

# One layer of each kind, the first with hash routing, and an MTP block; odd sizes as in random:tiny.
SMALL: dict[str, Any] = TINY | {
    "num_hidden_layers": 3,
    "num_hash_layers": 1,
    "compress_ratios": [0, 4, 16, 0],
    "n_routed_experts": 3,
    "num_experts_per_tok": 2,
}


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Applies `change` to the tensors of a checkpoint of one file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def anonymous_bytes() -> int:
    """Private memory of this process; pages of mapped files do not count."""
    match = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024
