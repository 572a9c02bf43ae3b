"""What the walk-through needs from a `config.json`, in the official dialect or in the one transformers saves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_HF_KINDS = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}


@dataclass(frozen=True)
class Layer:
    """One trunk layer. `overlap` marks CSA (overlapping windows and an indexer); ratio 0 is window only."""

    ratio: int
    overlap: bool
    hash: bool
    frequencies: np.ndarray  # [rope/2] float32


@dataclass(frozen=True)
class Shape:
    """Sizes and constants, named as in SPEC notation's config names."""

    raw: dict[str, Any]
    head_dim: int
    rope_dim: int
    layers: tuple[Layer, ...]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.raw[name]
        except KeyError:
            raise AttributeError(name) from None


def rope_frequencies(dim: int, base: float, yarn: dict[str, Any] | None) -> np.ndarray:
    """SPEC 2.1: base^(-2i/dim) in float32, and with YaRN a ramp from unscaled to divided by `factor`.

    The float32 steps are those of the definition, because an angle of position 300 shows the last bit of f_i.
    """
    two_i = np.arange(0, dim, 2, dtype=np.float32)
    power = np.power(float(base), (two_i / np.float32(dim)).astype(np.float64)).astype(np.float32)  # rounded once
    f = np.float32(1.0) / power
    if yarn is None:
        return f

    def corr(rotations: float) -> float:
        return dim * np.log(yarn["original_max_position_embeddings"] / (rotations * 2 * np.pi)) / (2 * np.log(base))

    low = max(int(np.floor(corr(yarn["beta_fast"]))), 0)
    high = min(int(np.ceil(corr(yarn["beta_slow"]))), dim - 1)
    width = high - low if high != low else 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)
    keep = np.float32(1) - ramp
    return f / np.float32(yarn["factor"]) * (np.float32(1) - keep) + f * keep


def read_shape(folder: Path) -> Shape:
    """Read `config.json` of either dialect."""
    raw = json.loads((folder / "config.json").read_text())
    head_dim = raw["head_dim"]
    count = raw["num_hidden_layers"]
    if "layer_types" in raw:  # as transformers saves it
        rates = raw["compress_rates"]
        ratios = [rates[kind] if _HF_KINDS[kind] else 0 for kind in raw["layer_types"]]
        overlaps = [kind == "compressed_sparse_attention" for kind in raw["layer_types"]]
        hashes = [kind == "hash_moe" for kind in raw["mlp_layer_types"]]
        compress = raw["rope_parameters"]["compress"]
        rope_dim = round(head_dim * compress["partial_rotary_factor"])
        bases = raw["rope_parameters"]["main"]["rope_theta"], compress["rope_theta"]
        yarn = compress if compress["rope_type"] == "yarn" else None
    else:
        ratios = raw["compress_ratios"][:count]
        overlaps = [ratio == 4 for ratio in ratios]
        hashes = [layer < raw["num_hash_layers"] for layer in range(count)]
        rope_dim = raw["qk_rope_head_dim"]
        bases = raw["rope_theta"], raw["compress_rope_theta"]
        yarn = raw["rope_scaling"]
    window_f = rope_frequencies(rope_dim, bases[0], None)
    compress_f = rope_frequencies(rope_dim, bases[1], yarn)
    layers = tuple(
        Layer(ratio, overlap, hashed, compress_f if ratio else window_f)
        for ratio, overlap, hashed in zip(ratios, overlaps, hashes, strict=True)
    )
    return Shape(raw, head_dim, rope_dim, layers)
