"""The training checkpoint: float32 weights in four safetensors shards under 16 MiB each, and a JSON of where the run
stands."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SHARDS = 4


def save_master(folder: Path, model: torch.nn.Module, state: dict[str, float]) -> None:
    """Tensors go round-robin by size into the shards; the optimizer's moments are not kept (they refill in some
    hundred steps)."""
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(SHARDS)]
    sizes = [0] * SHARDS
    for name, tensor in sorted(model.state_dict().items(), key=lambda kv: (-kv[1].numel(), kv[0])):
        i = sizes.index(min(sizes))
        shards[i][name] = tensor.detach().cpu().contiguous()
        sizes[i] += tensor.numel() * tensor.element_size()
    for i, shard in enumerate(shards):
        save_file(shard, folder / f"master-{i}.safetensors")
    (folder / "state.json").write_text(json.dumps(state) + "\n")


def load_master(folder: Path, model: torch.nn.Module) -> dict[str, float]:
    tensors: dict[str, torch.Tensor] = {}
    for i in range(SHARDS):
        tensors |= load_file(folder / f"master-{i}.safetensors")
    model.load_state_dict(tensors)
    return json.loads((folder / "state.json").read_text())
