"""`random:flash` and `random:pro`: weights of the real shapes, made on the device from a seed, in their stored formats.

Every value is drawn where it stays: 4-bit codes and scales are random bytes, so no dense copy exists, nothing is
quantised and nothing crosses from the host. A linear's outputs have the standard deviation `gain` for inputs of
standard deviation 1, as in random.py. Each tensor has its own generator, seeded by (seed, key): the same bytes on
devices of one type.

| format | codes                             | scales                                                      |
|--------|-----------------------------------|-------------------------------------------------------------|
| nvfp4  | all 16, equally often             | 32..120, equally often; the global sets the deviation       |
| fp4    | all 16, equally often             | two neighbouring powers of two, mixed to meet the deviation |
| fp8    | +-0.125..1.875, log-uniform       | likewise, per block                                         |
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from dsv4.checkpoint.names import TensorSpec, expected_tensors
from dsv4.checkpoint.pack import place
from dsv4.checkpoint.plan import stack_name
from dsv4.checkpoint.random import gain, random_param, seed_of
from dsv4.checkpoint.sizes import Format, format_bytes
from dsv4.config import ModelConfig
from dsv4.errors import CapacityError, ConfigError
from dsv4.parallel.shard import Share
from dsv4.quant import fp8, mxfp4, nvfp4
from dsv4.quant.formats import E2M1_VALUES, E8M0_BIAS, e4m3_decode
from dsv4.quant.weights import FP8Weight, MXFP4Weight, NVFP4Weight, PlainWeight, Weight

SYNTHETIC = ("random:flash", "random:pro")
USABLE = 0.95  # of the free memory: the rest is for the cache, a step's buffers and one weight that is repacked
_GLOBAL_SPREAD = 0.05  # globals of a stack differ by up to so much, so that a mixed-up one is seen
_TABLE_ROWS = 8192  # rows of a hash table drawn at a time
_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
# Bits of a random byte that are kept, and bits that are set: E4M3 scales 2^5..2^7, E4M3 values +-2^-3..2^1.
_SCALE_BITS = (0x0F, 0x60)
_VALUE_BITS = (0x9F, 0x20)


def shortened(config: ModelConfig, layers: int | None) -> ModelConfig:
    """The same model with the first `layers` layers of its schedule (all for None). Raises ConfigError."""
    if layers is None:
        return config
    if not 1 <= layers <= config.num_hidden_layers:
        raise ConfigError(
            f"layers = {layers}: this model has {config.num_hidden_layers} layers; keep 1 or more of them"
        )
    return replace(config, num_hidden_layers=layers, layers=config.layers[:layers])


def form_of(spec: TensorSpec, policy: Literal["native", "nvfp4"]) -> Format:
    """How a tensor is stored: under `native` in the mix NVIDIA ships, trunk experts NVFP4 and the rest official."""
    if spec.role == "param":
        return spec.stored
    trunk_expert = spec.role == "expert" and spec.block.startswith("layers.")
    return "nvfp4" if trunk_expert or (policy == "nvfp4" and spec.nvfp4) else spec.stored


def stacked(config: ModelConfig, mtp: bool = False) -> dict[str, tuple[TensorSpec, int]]:
    """Canonical key -> (spec of one matrix, experts): routed experts as one entry, everything else with 0."""
    found = {}
    for name, spec in expected_tensors(config, mtp).items():
        if spec.role != "expert":
            found[name] = spec, 0
        elif ".experts.0." in name:
            found[stack_name(name)] = spec, config.n_routed_experts
    return found


def synthetic_bytes(
    config: ModelConfig, policy: Literal["native", "nvfp4"], mtp: bool = False, share: Share = Share()
) -> dict[str, int]:
    """Bytes of a rank's weights by block (`layers.3`; the empty name is the top level), NVFP4's globals included."""
    blocks: dict[str, int] = {}
    for spec, experts in stacked(config, mtp).values():
        form = form_of(spec, policy)
        cut = spec.cut(share)
        shape = spec.shape if cut is None else cut.shape(spec.shape)
        one = format_bytes(shape, form) + (4 if form == "nvfp4" else 0)
        blocks[spec.block] = blocks.get(spec.block, 0) + one * max(len(share.experts(experts)), 1)
    return blocks


def free_bytes(device: torch.device) -> int:
    """Memory that tensors on `device` may still take: what CUDA has free and torch has cached; all of a host's."""
    if device.type != "cuda":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def check_capacity(
    name: str,
    config: ModelConfig,
    policy: Literal["native", "nvfp4"],
    device: torch.device,
    mtp: bool = False,
    share: Share = Share(),
) -> None:
    """Raise CapacityError, with the number of layers that would fit, when the weights do not fit on `device`."""
    blocks = synthetic_bytes(config, policy, mtp, share)
    needed, room = sum(blocks.values()), int(free_bytes(device) * USABLE)
    if needed <= room:
        return
    left = room - sum(size for block, size in blocks.items() if not block.startswith("layers."))
    fitting = 0
    for index in range(len(config.layers)):
        left -= blocks[f"layers.{index}"]
        fitting += left >= 0
    advice = f"layers={fitting} fits (--layers {fitting})" if fitting else "not even one layer fits"
    raise CapacityError(
        f"{name} with {len(config.layers)} layers and weights='{policy}' takes {needed / 1e9:.1f} GB, but {device} has "
        f"{room / 1e9:.1f} GB for weights; {advice}"
    )


def synthesize(
    config: ModelConfig,
    policy: Literal["native", "nvfp4"] = "native",
    device: torch.device | str = "cpu",
    *,
    seed: int = 0,
    mtp: bool = False,
    share: Share = Share(),
) -> Iterator[tuple[str, Weight | Tensor]]:
    """(canonical key, weight) one by one: Weights for linears, experts stacked [E, N, K], tensors for the rest.

    A rank gets its share of the same values: each tensor is made whole, then cut.
    """
    for key, spec, whole in _synthesize(config, policy, device, seed, mtp):
        cut = spec.cut(share)
        if spec.role == "expert" and share.by_expert:
            assert isinstance(whole, Weight)
            held = share.experts(config.n_routed_experts)
            parts = {part: t[held.start : held.stop].clone() for part, t in whole.tensors().items()}
            yield key, type(whole)(**parts)
        elif cut is None:
            yield key, whole
        elif isinstance(whole, Tensor):
            yield key, cut.of(whole).clone()
        else:
            yield key, place(cut.of(whole), whole.device)


def _synthesize(
    config: ModelConfig, policy: Literal["native", "nvfp4"], device: torch.device | str, seed: int, mtp: bool
) -> Iterator[tuple[str, TensorSpec, Weight | Tensor]]:
    device = torch.device(device)
    for key, (spec, experts) in stacked(config, mtp).items():
        form = form_of(spec, policy)
        source = torch.Generator(device).manual_seed(seed_of(seed, key))
        if spec.role == "param":
            yield key, spec, _param(spec, config, source)
            continue
        shape = (experts, *spec.shape) if experts else spec.shape
        deviation = gain(key) / math.sqrt(spec.shape[1])
        if form == "nvfp4":
            # w1 and w3 feed one GEMM and share their global, as in checkpoints.
            joint = torch.Generator(device).manual_seed(seed_of(seed, key.replace(".w3", ".w1") + " global"))
            yield key, spec, _nvfp4(shape, deviation, source, joint)
        elif form == "fp4":
            yield key, spec, _mxfp4(shape, deviation, source)
        elif form == "fp8":
            yield key, spec, _fp8(shape, deviation, source)
        else:
            data = torch.empty(shape, dtype=_DTYPES[form], device=device)
            yield key, spec, PlainWeight(data.normal_(0, deviation, generator=source))


def _param(spec: TensorSpec, config: ModelConfig, source: torch.Generator) -> Tensor:
    if spec.stored == "i64":
        parts = []
        for first in range(0, spec.shape[0], _TABLE_ROWS):
            rows = min(_TABLE_ROWS, spec.shape[0] - first)
            scores = torch.rand(rows, config.n_routed_experts, generator=source, device=source.device)
            parts.append(scores.topk(spec.shape[1]).indices)  # distinct experts for every token
        return torch.cat(parts)
    noise = torch.empty(spec.shape, dtype=_DTYPES[spec.stored], device=source.device).normal_(generator=source)
    return random_param(spec.name, noise)


def _nvfp4(shape: tuple[int, ...], deviation: float, source: torch.Generator, joint: torch.Generator) -> NVFP4Weight:
    codes = _random_bytes((*shape[:-1], shape[-1] // 2), source)
    scale = _random_bytes((*shape[:-1], shape[-1] // nvfp4.GROUP), source, *_SCALE_BITS).view(torch.float8_e4m3fn)
    spread = torch.rand(shape[:-2], generator=joint, device=joint.device).sub_(0.5).mul_(2 * _GLOBAL_SPREAD).add_(1)
    return NVFP4Weight(codes, scale, spread.mul_(deviation / (_code_rms() * _byte_rms(*_SCALE_BITS))))


def _mxfp4(shape: tuple[int, ...], deviation: float, source: torch.Generator) -> MXFP4Weight:
    codes = _random_bytes((*shape[:-1], shape[-1] // 2), source)
    return MXFP4Weight(codes, _powers((*shape[:-1], shape[-1] // mxfp4.GROUP), deviation / _code_rms(), source))


def _fp8(shape: tuple[int, ...], deviation: float, source: torch.Generator) -> FP8Weight:
    data = _random_bytes(shape, source, *_VALUE_BITS).view(torch.float8_e4m3fn)
    blocks = (*shape[:-2], -(-shape[-2] // fp8.BLOCK), -(-shape[-1] // fp8.BLOCK))
    return FP8Weight(data, _powers(blocks, deviation / _byte_rms(*_VALUE_BITS), source))


def _random_bytes(shape: tuple[int, ...], source: torch.Generator, keep: int = 0xFF, fixed: int = 0) -> Tensor:
    """[shape] uint8 of random bits under `keep`, with the bits of `fixed` set; drawn eight at a time."""
    count = math.prod(shape)
    words = torch.empty(-(-count // 8), dtype=torch.int64, device=source.device)
    words.random_(-(2**63), None, generator=source)
    if keep != 0xFF:
        words.bitwise_and_(_eight_times(keep)).bitwise_or_(_eight_times(fixed))
    return words.view(torch.uint8)[:count].view(shape)


def _powers(shape: tuple[int, ...], rms: float, source: torch.Generator) -> Tensor:
    """E8M0 bytes [shape] of 2^k and 2^(k+1) in the mixture whose root mean square is `rms`."""
    k = math.floor(math.log2(rms))
    share = ((rms / 2.0**k) ** 2 - 1) / 3
    larger = torch.rand(shape, generator=source, device=source.device) < share
    return larger.to(torch.uint8).add_(E8M0_BIAS + k)


def _eight_times(byte: int) -> int:
    return int.from_bytes(bytes([byte]) * 8, "little", signed=True)


@cache
def _code_rms() -> float:
    return math.sqrt(sum(value**2 for value in E2M1_VALUES) / len(E2M1_VALUES))


@cache
def _byte_rms(keep: int, fixed: int) -> float:
    """Root mean square of the E4M3 numbers that random bytes under this mask are."""
    values = e4m3_decode(torch.tensor([byte & keep | fixed for byte in range(256)], dtype=torch.uint8))
    return math.sqrt(float(values.double().square().mean()))
