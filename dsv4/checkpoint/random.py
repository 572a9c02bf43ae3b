"""Seeded random weights for tests and for `random:tiny`: no file, every mechanism alive, every number finite.

Each tensor has its own generator, seeded by (seed, name), so it does not depend on which others are made.
"""

import hashlib
import math
from pathlib import Path

import torch
from torch import Tensor

from dsv4.checkpoint.header import TensorEntry
from dsv4.checkpoint.modelopt import MODELOPT
from dsv4.checkpoint.names import TensorSpec, expected_tensors
from dsv4.checkpoint.official import FP8, MXFP4, PLAIN
from dsv4.checkpoint.reader import as_bytes
from dsv4.config import ModelConfig
from dsv4.errors import CheckpointError
from dsv4.quant.weights import FP8Weight, MXFP4Weight, NVFP4Weight, PlainWeight

MAX_RANDOM_ELEMENTS = 200_000_000
_DTYPE_NAMES = {
    torch.uint8: "U8", torch.int8: "I8", torch.int64: "I64", torch.bfloat16: "BF16", torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
# Standard deviation of the outputs for inputs of standard deviation 1; 1 where nothing is said. Logits, gates and
# pooling weights get more, so that maxima, expert choices and softmaxes are not all alike.
GAINS = {"head": 4.0, "ffn.gate": 2.0, "compressor.wgate": 2.0, "indexer.weights_proj": 2.0}


class MemoryCheckpoint:
    """Stored tensors by on-disk name with their config: what the loader reads, without a file."""

    unknown = False
    unreadable: frozenset[str] = frozenset()

    def __init__(self, tensors: dict[str, Tensor], config: ModelConfig, label: str) -> None:
        self._tensors = tensors
        self._config = config
        self.path = Path(label)
        self.entries = {
            name: TensorEntry(name, _DTYPE_NAMES[t.dtype], tuple(t.shape), t.numel() * t.element_size(), self.path)
            for name, t in tensors.items()
        }

    def config(self) -> ModelConfig:
        return self._config

    def tensor(self, name: str) -> Tensor:
        return as_bytes(self._tensors[name])


def memory_checkpoint(name: str, seed: int = 0) -> MemoryCheckpoint:
    """`random:tiny` in the mix of formats that NVIDIA publishes: experts NVFP4 (in draft blocks MXFP4), attention and
    shared experts FP8, the rest BF16 and F32. CheckpointError for a configuration too large for stored tensors: those
    are made on the device (synthetic.py)."""
    config = ModelConfig.from_name(name)
    elements = sum(spec.numel for spec in expected_tensors(config, mtp=True).values())
    if elements > MAX_RANDOM_ELEMENTS:
        raise CheckpointError(
            f"{name} has no stored tensors: its {elements:,} elements are made on the device when it is loaded; where "
            f"files are read, give a checkpoint or random:tiny"
        )
    stored: dict[str, Tensor] = {}
    specs = expected_tensors(config, mtp=True)
    for key, master in random_tensors(config, seed).items():
        spec = specs[key]
        stored |= store(spec, master, nvfp4=spec.role == "expert" and spec.block.startswith("layers."))
    return MemoryCheckpoint(stored, config, name)


def store(spec: TensorSpec, master: Tensor, *, nvfp4: bool = False) -> dict[str, Tensor]:
    """The tensors to store for one master by their full official name: ModelOpt NVFP4, or as DeepSeek stores it."""
    if spec.role == "param":
        return {spec.name: master}
    if nvfp4:
        parts = MODELOPT.encode(NVFP4Weight.quantize(master, name=spec.name))
    elif spec.stored == "fp4":
        parts = MXFP4.encode(MXFP4Weight.quantize(master, name=spec.name))
    elif spec.stored == "fp8":
        parts = FP8.encode(FP8Weight.quantize(master, name=spec.name))
    else:
        parts = PLAIN.encode(PlainWeight(master))
    return {f"{spec.name}.{suffix}": tensor for suffix, tensor in parts.items()}


def random_tensors(config: ModelConfig, seed: int = 0, mtp: bool = True) -> dict[str, Tensor]:
    """A BF16, F32 or I64 master by key of `expected_tensors` (experts one by one), the same for the same seed."""
    return {name: _random_tensor(spec, config, seed) for name, spec in expected_tensors(config, mtp).items()}


def seed_of(seed: int, name: str) -> int:
    """What seeds the generator of one tensor."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def gain(name: str) -> float:
    """Standard deviation of a linear's outputs for inputs of standard deviation 1."""
    return next((value for end, value in GAINS.items() if name.endswith(end)), 1.0)


def _random_tensor(spec: TensorSpec, config: ModelConfig, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed_of(seed, spec.name))
    if spec.stored == "i64":
        scores = torch.rand(spec.shape[0], config.n_routed_experts, generator=generator)
        return scores.argsort(dim=-1)[:, : spec.shape[1]].contiguous()  # distinct experts for every token
    noise = torch.randn(spec.shape, generator=generator)
    if spec.role != "param":
        rows = torch.randn(spec.shape[0], 1, generator=generator).mul(0.3).exp()  # so that block scales differ
        value = noise * rows * (gain(spec.name) / math.sqrt(spec.shape[1]))
    else:
        value = random_param(spec.name, noise)
    return value.to(torch.float32 if spec.stored == "f32" else torch.bfloat16)


def random_param(name: str, noise: Tensor) -> Tensor:
    """The values of a parameter from standard normal noise of its shape, in the noise's dtype."""
    if name.endswith("norm.weight"):
        return 1 + 0.2 * noise
    if name.endswith("_fn"):  # mixes the RMS-normalised streams: logits of standard deviation 1
        return noise / math.sqrt(noise.shape[-1])
    if name.endswith("_scale"):
        return 0.5 + noise.abs() / 2
    if name.endswith(("_base", "ape")):
        return noise / 2
    if name.endswith("gate.bias"):
        return noise / 4
    return noise  # embed, markov_w1, attn_sink
