"""The header of one safetensors file: names, dtypes, shapes and byte ranges, read without touching the data.

Format (https://github.com/huggingface/safetensors): u64 little-endian header length, JSON header, data. The library
stops at the first fault; this reader reports each one, because a broken download usually has several.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from dsv4.checkpoint.faults import Faults

ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
LFS_MAGIC = b"version https://git-lfs"
PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class TensorEntry:
    """What a header says of one tensor. `dtype` is the safetensors name ("F8_E4M3"); `nbytes` counts stored bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    shard: Path


def pickle_advice(path: Path) -> str:
    return (
        f"{path.name}: a pickle file can run code when it is opened, so dsv4 never reads one; convert it in an "
        "environment you trust: safetensors.torch.save_file(torch.load(file, weights_only=True), 'model.safetensors')"
    )


def read_header(path: Path, faults: Faults) -> dict[str, TensorEntry] | None:
    """Entries of the file at `path` by tensor name, or None when the header cannot be read at all.

    Every fault goes to `faults`; entries whose bytes are not all in the file are still returned, so that their
    shapes can be checked too.
    """
    if path.is_symlink() and not path.exists():
        faults.add(f"{path.name}: dangling symbolic link to {path.readlink()}; the download was interrupted, repeat it")
        return None
    if not path.is_file():
        faults.add(f"{path.name}: no such file")
        return None
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_MAGIC))
            if start == LFS_MAGIC:
                faults.add(f"{path.name}: a git-LFS pointer of {size} bytes, not the weights; run `git lfs pull`")
                return None
            length = int.from_bytes(start[:8], "little")
            implausible = size < 8 or length > min(size - 8, MAX_HEADER_BYTES)
            # A header of 640 bytes begins like a pickle, so the magic counts only where the length cannot be one.
            if path.suffix in PICKLE_SUFFIXES or (implausible and start.startswith(PICKLE_MAGIC)):
                faults.add(pickle_advice(path))
                return None
            if implausible:
                faults.add(
                    f"{path.name}: truncated or not a safetensors file ({size} bytes, its first 8 announce a header of "
                    f"{length}); download it again"
                )
                return None
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        faults.add(f"{path.name}: cannot be read ({error.strerror})")
        return None
    return _parse(path, text, size - 8 - length, faults)


def load_json_object(text: bytes | str, what: str, faults: Faults) -> dict[str, Any] | None:
    """The JSON object in `text`, or None and a fault; a key written twice is a fault too."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                faults.add(f"{what}: {key!r} appears twice")
            found[key] = value
        return found

    try:
        parsed = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        faults.add(f"{what}: not valid JSON ({error})")
        return None
    if not isinstance(parsed, dict):
        faults.add(f"{what}: expected a JSON object, found {type(parsed).__name__}")
        return None
    return parsed


def _parse(path: Path, text: bytes, data_bytes: int, faults: Faults) -> dict[str, TensorEntry] | None:
    header = load_json_object(text, f"{path.name} header", faults)
    if header is None:
        return None
    header.pop("__metadata__", None)
    entries: dict[str, TensorEntry] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, record in header.items():
        problem, entry, span = _entry(path, name, record)
        if problem:
            faults.add(f"{path.name}: {name}: {problem}")
        if entry is not None:
            entries[name] = entry
        if span is not None:
            ranges.append((*span, name))
    _check_ranges(path, sorted(ranges), data_bytes, faults)
    return entries


def _entry(path: Path, name: str, record: Any) -> tuple[str | None, TensorEntry | None, tuple[int, int] | None]:
    """(fault, entry, byte range) of one header record; the entry survives a bad range when its shape can be read."""
    if not isinstance(record, dict):
        return f"header record is {type(record).__name__}, expected an object", None, None
    dtype, shape, span = record.get("dtype"), record.get("shape"), record.get("data_offsets")
    if dtype not in ITEM_BITS:
        return f"unknown dtype {dtype!r}; safetensors has {', '.join(sorted(ITEM_BITS))}", None, None
    if not _all_counts(shape):
        return f"shape {shape!r} is not a list of sizes", None, None
    nbytes = math.prod(shape) * ITEM_BITS[dtype] // 8
    entry = TensorEntry(name, dtype, tuple(shape), nbytes, path)
    if not _all_counts(span) or len(span) != 2 or span[0] > span[1]:
        return f"data_offsets {span!r} are not [begin, end]", entry, None
    if span[1] - span[0] != nbytes:
        return f"data_offsets hold {span[1] - span[0]} bytes, {dtype} {shape} needs {nbytes}", entry, None
    return None, entry, (span[0], span[1])


def _all_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)


def _check_ranges(path: Path, ranges: list[tuple[int, int, str]], data_bytes: int, faults: Faults) -> None:
    """The ranges must tile the data without hole or overlap, and the file must hold exactly that many bytes."""
    position = 0
    for begin, end, name in ranges:
        if begin != position:
            word = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            faults.add(f"{path.name}: {name}: begins at data byte {begin}, expected {position} ({word})")
        position = max(position, end)
    if data_bytes < position:
        lost = [name for _, end, name in ranges if end > data_bytes]
        faults.add(
            f"{path.name}: truncated: {data_bytes} data bytes, its header needs {position}; {len(lost)} tensors "
            f"are incomplete, the first is {lost[0]}; download it again"
        )
    elif data_bytes > position and ranges:
        faults.add(f"{path.name}: {data_bytes - position} bytes too many after the last tensor; download it again")
