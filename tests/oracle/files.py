"""safetensors files as bytes: read and write without any tensor library, so FP8, FP4 and BF16 stay what they are."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .formats import decode_e2m1, decode_e4m3, decode_e8m0, unpack_nibbles

# The names transformers saves differently from the official files (the rest it renames back on saving).
_SAVED_BY_TRANSFORMERS = {"embed_tokens.": "embed.", "hc_head.hc_": "hc_head_", ".attn.norm.": ".attn.kv_norm."}
_STORAGE = {"F8_E4M3": "<u1", "F8_E8M0": "<u1", "U8": "<u1", "I8": "<u1", "BF16": "<u2", "F32": "<f4", "I64": "<i8"}


@dataclass(frozen=True)
class Stored:
    """One tensor as the file holds it: `dtype` is the file's name for it, `raw` the untouched storage words."""

    dtype: str
    raw: NDArray[Any]

    def floats(self) -> NDArray[np.float64]:
        """Values of a tensor that stands alone (no scale)."""
        if self.dtype == "BF16":
            return (self.raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        if self.dtype == "F32":
            return self.raw.astype(np.float64)
        if self.dtype == "F8_E4M3":
            return decode_e4m3(self.raw)
        if self.dtype == "F8_E8M0":
            return decode_e8m0(self.raw)
        raise ValueError(f"{self.dtype} does not stand alone as floats")


def bf16(x: NDArray[Any]) -> Stored:
    """Round float values to BF16, nearest even."""
    bits = np.asarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return Stored("BF16", ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2"))


def f32(x: NDArray[Any]) -> Stored:
    """Store as float32."""
    return Stored("F32", np.asarray(x).astype("<f4"))


def read_folder(folder: Path) -> dict[str, Stored]:
    """Every tensor of every safetensors file in `folder`; names become the official ones."""
    tensors: dict[str, Stored] = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        (size,) = struct.unpack_from("<Q", data)
        for name, entry in json.loads(data[8 : 8 + size]).items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            raw = np.frombuffer(data[8 + size + begin : 8 + size + end], dtype=_STORAGE[entry["dtype"]])
            name = name.removeprefix("model.")
            for saved, official in _SAVED_BY_TRANSFORMERS.items():
                name = name.replace(saved, official)
            tensors[name] = Stored(entry["dtype"], raw.reshape(entry["shape"]))
    return tensors


def write_file(path: Path, tensors: dict[str, Stored]) -> int:
    """Write one safetensors file; returns the payload bytes."""
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.raw.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.raw.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            out.write(np.ascontiguousarray(tensor.raw).tobytes())
    return offset


def write_shards(folder: Path, shards: list[dict[str, Stored]]) -> None:
    """Write `model-0000i-of-0000n.safetensors` with the index file that names them."""
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        total += write_file(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def linear_weight(tensors: dict[str, Stored], module: str) -> tuple[str, NDArray[np.float64]]:
    """(format, values [N, K]) of the linear called `module`: format is `fp4`, `fp8` or `plain`."""
    weight, scale = tensors[f"{module}.weight"], tensors.get(f"{module}.scale")
    if scale is None:
        return "plain", weight.floats()
    if weight.dtype == "I8":  # two E2M1 codes a byte, one E8M0 scale per row and 32 inputs
        values = decode_e2m1(unpack_nibbles(weight.raw))
        return "fp4", values * np.repeat(scale.floats(), 32, axis=-1)
    rows, columns = weight.raw.shape  # one E8M0 scale per 128x128 block, the last blocks may be cut
    blocks = np.repeat(np.repeat(scale.floats(), 128, axis=0), 128, axis=1)[:rows, :columns]
    return "fp8", weight.floats() * blocks
