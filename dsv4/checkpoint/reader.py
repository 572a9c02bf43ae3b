"""A checkpoint on disk: one folder or one .safetensors file, its tensors by name, memory-mapped.

`Checkpoint.open` looks at every header and at the index, and raises one CheckpointError that lists every fault. Tensor
data is read only by `Checkpoint.tensor`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from dsv4.checkpoint.faults import Faults
from dsv4.checkpoint.header import PICKLE_SUFFIXES, TensorEntry, load_json_object, pickle_advice, read_header
from dsv4.config import ModelConfig
from dsv4.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
# The bits are what counts: a numeric copy of E8M0 destroys them, and int8 nibbles sign-extend when shifted.
_VIEW_AS_BYTES = (torch.float8_e8m0fnu, torch.int8)


class TensorSource(Protocol):
    """What the loader needs of a checkpoint: `Checkpoint` reads files, `random.MemoryCheckpoint` holds tensors."""

    @property
    def entries(self) -> dict[str, TensorEntry]: ...

    @property
    def unknown(self) -> bool: ...

    @property
    def unreadable(self) -> frozenset[str]: ...

    def config(self) -> ModelConfig: ...

    def tensor(self, name: str) -> torch.Tensor: ...


class Checkpoint:
    """Header facts of every tensor (`entries`, on-disk names) and the data by name.

    path: the checkpoint's folder, which also holds config.json and the tokenizer.
    unreadable: tensors whose data cannot be read because their shard is broken (only after `scan`).
    unknown: True when a broken shard may hold tensors that nothing lists (only after `scan`).
    """

    def __init__(self, path: Path, entries: dict[str, TensorEntry], unreadable: set[str], unknown: bool) -> None:
        self.path = path
        self.entries = entries
        self.unreadable = frozenset(unreadable)
        self.unknown = unknown
        self._files: dict[Path, Any] = {}

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """The checkpoint at `path`. CheckpointError lists every fault of its files."""
        faults = Faults()
        checkpoint = cls.scan(path, faults)
        faults.raise_if_any(path)
        return checkpoint

    @classmethod
    def scan(cls, path: str | Path, faults: Faults) -> "Checkpoint":
        """As `open`, but the faults go to `faults` and what could be read is returned, so that checks can go on."""
        given = Path(path).expanduser()
        if given.is_dir():
            folder = resolve_folder(given)
            return _Scan(folder, faults).run()
        if given.suffix == ".safetensors" or given.is_file() or given.is_symlink():
            scan = _Scan(given.parent, faults)
            scan.add_shard(given, None)
            return scan.result()
        raise CheckpointError(f"{path}: no such file or folder; expected a checkpoint folder or a .safetensors file")

    def config(self) -> ModelConfig:
        """The checked config.json beside the tensors. ConfigError lists its faults."""
        return ModelConfig.from_path(self.path)

    def tensor(self, name: str) -> torch.Tensor:
        """The stored tensor as a view of the mapped file; E8M0 and int8 come as uint8 with the same bits."""
        shard = self.entries[name].shard
        if shard not in self._files:
            self._files[shard] = safe_open(str(shard), framework="pt", device="cpu")
        return as_bytes(self._files[shard].get_tensor(name))

    def close(self) -> None:
        self._files.clear()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, with E8M0 and int8 viewed as uint8."""
    return tensor.view(torch.uint8) if tensor.dtype in _VIEW_AS_BYTES else tensor


def resolve_folder(folder: Path) -> Path:
    """`folder` itself, or the snapshot inside a Hugging Face cache folder (models--org--name/snapshots/<revision>)."""
    snapshots = folder / "snapshots"
    if (folder / "config.json").exists() or not snapshots.is_dir():
        return folder
    main = folder / "refs" / "main"
    if main.is_file() and (snapshots / main.read_text().strip()).is_dir():
        return snapshots / main.read_text().strip()
    found = sorted(child for child in snapshots.iterdir() if child.is_dir())
    if len(found) == 1:
        return found[0]
    raise CheckpointError(
        f"{folder}: a cache folder with {len(found)} snapshots and no refs/main; name one of: "
        f"{', '.join(str(child) for child in found) or 'none is there, repeat the download'}"
    )


class _Scan:
    """One pass over the files of a folder; collects entries and faults."""

    def __init__(self, folder: Path, faults: Faults) -> None:
        self.folder = folder
        self.faults = faults
        self.entries: dict[str, TensorEntry] = {}
        self.unreadable: set[str] = set()
        self.unknown = False

    def run(self) -> Checkpoint:
        index = self.folder / INDEX_NAME
        shards = sorted(p for p in self.folder.iterdir() if p.suffix == ".safetensors")
        if index.exists() or index.is_symlink():
            self._indexed(index, shards)
        elif len(shards) == 1:
            self.add_shard(shards[0], None)
        elif shards:
            self.faults.add(f"{len(shards)} .safetensors files but no {INDEX_NAME}; download the index as well")
            for shard in shards:
                self.add_shard(shard, None)
        else:
            self._nothing_to_read()
        return self.result()

    def result(self) -> Checkpoint:
        return Checkpoint(self.folder, self.entries, self.unreadable, self.unknown)

    def add_shard(self, shard: Path, promised: set[str] | None) -> None:
        """Takes in the tensors of `shard`; `promised` are the names the index puts there, None without an index."""
        before = len(self.faults)
        entries = read_header(shard, self.faults)
        if entries is None:
            self.unreadable |= promised or set()
            self.unknown |= promised is None
            return
        if len(self.faults) > before:
            self.unreadable |= entries.keys()
        else:
            self._ask_library(shard, entries)
        for name in sorted(entries.keys() & self.entries.keys()):
            self.faults.add(f"{name}: duplicate tensor, in {self.entries[name].shard.name} and in {shard.name}")
        self.entries.update(entries)
        for name in sorted(promised - entries.keys() if promised is not None else ()):
            self.faults.add(f"{INDEX_NAME}: {name} is said to be in {shard.name}, which does not hold it")
            self.unreadable.add(name)
        for name in sorted(entries.keys() - promised if promised is not None else ()):
            self.faults.add(f"{INDEX_NAME}: {name} is in {shard.name} but the index does not list it there")

    def _ask_library(self, shard: Path, entries: dict[str, TensorEntry]) -> None:
        try:
            safe_open(str(shard), framework="pt", device="cpu")
        except (SafetensorError, OSError, ValueError) as error:
            self.faults.add(f"{shard.name}: safetensors refuses it: {error}")
            self.unreadable |= entries.keys()

    def _indexed(self, index: Path, shards: list[Path]) -> None:
        weight_map = self._weight_map(index)
        if weight_map is None:
            for shard in shards:
                self.add_shard(shard, None)
            return
        by_shard: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            by_shard.setdefault(file, set()).add(name)
        for file, names in sorted(by_shard.items()):
            self._indexed_shard(file, names)
        for shard in shards:
            if shard.name not in by_shard:
                self.faults.add(f"{shard.name}: in the folder but {INDEX_NAME} does not name it; remove it or add it")

    def _indexed_shard(self, file: str, names: set[str]) -> None:
        if Path(file).is_absolute() or ".." in Path(file).parts or "\\" in file:
            self.faults.add(f"{INDEX_NAME}: the shard path {file!r} leaves the folder; it must be a plain file name")
        elif Path(file).suffix in PICKLE_SUFFIXES:
            self.faults.add(pickle_advice(Path(file)))
        elif not (self.folder / file).exists() and not (self.folder / file).is_symlink():
            self.faults.add(f"{file}: missing shard; {INDEX_NAME} puts {len(names)} tensors there; download it")
        else:
            self.add_shard(self.folder / file, names)
            return
        self.unreadable |= names

    def _weight_map(self, index: Path) -> dict[str, str] | None:
        try:
            text = index.read_bytes()
        except OSError as error:
            self.faults.add(f"{INDEX_NAME}: cannot be read ({error.strerror})")
            return None
        parsed = load_json_object(text, INDEX_NAME, self.faults)
        if parsed is None:
            return None
        weight_map = parsed.get("weight_map")
        if isinstance(weight_map, dict) and weight_map and all(isinstance(file, str) for file in weight_map.values()):
            return weight_map
        self.faults.add(f"{INDEX_NAME}: expected a 'weight_map' of tensor name -> file name; download it again")
        return None

    def _nothing_to_read(self) -> None:
        pickles = sorted(p for p in self._files() if p.suffix in PICKLE_SUFFIXES)
        for pickle in pickles:
            self.faults.add(pickle_advice(pickle))
        if not pickles:
            self.faults.add(f"no .safetensors file and no {INDEX_NAME} in the folder")
        self.unknown = True

    def _files(self) -> Iterator[Path]:
        return (p for p in self.folder.iterdir() if p.is_file() or p.is_symlink())
