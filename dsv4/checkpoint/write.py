"""Writes a checkpoint folder shard by shard beside its destination and renames it into place when it is complete."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dsv4.checkpoint.reader import INDEX_NAME
from dsv4.errors import CheckpointError

SHARD_BYTES = 4 << 30


class FolderWriter:
    """A context: tensors added to it reach `destination` only if the block ends without an error.

    Tensors gather in memory up to `shard_bytes`, then go to disk, so memory stays bounded by one shard. Raises
    CheckpointError when the disk refuses; the unfinished folder is then removed.
    """

    def __init__(self, destination: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.destination = destination
        self.written = 0
        self._shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []

    def __enter__(self) -> "FolderWriter":
        self.destination.parent.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=f".{self.destination.name}.", dir=self.destination.parent))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
            elif isinstance(error, OSError | SafetensorError):
                raise self._refused(error) from error
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)  # after the rename there is nothing left to remove

    def add(self, name: str, tensor: Tensor) -> None:
        """Appends one tensor; it is copied to disk when its shard is full, so it must not change until then."""
        nbytes = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + nbytes > self._shard_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += nbytes

    def add_json(self, name: str, data: dict[str, Any]) -> None:
        (self._folder / name).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def copy(self, source: Path, name: str) -> None:
        """Copies the file `source` (through a symbolic link) to `name`, which may lie in a sub-folder."""
        target = self._folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)

    def _flush(self) -> None:
        save_file(self._pending, self._shard(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self.written += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _shard(self, index: int) -> Path:
        return self._folder / f"shard-{index}.safetensors"

    def _finish(self) -> None:
        try:
            if self._pending:
                self._flush()
            weight_map: dict[str, str] = {}
            for index, names in enumerate(self._shards):
                file = f"model-{index + 1:05d}-of-{len(self._shards):05d}.safetensors"
                self._shard(index).rename(self._folder / file)
                weight_map |= dict.fromkeys(names, file)
            self.add_json(INDEX_NAME, {"metadata": {"total_size": self.written}, "weight_map": weight_map})
            self._folder.chmod(0o777 & ~_umask())  # mkdtemp is private; a checkpoint is an ordinary folder
            if self.destination.exists():
                raise CheckpointError(f"{self.destination} appeared while it was being written; kept as it is")
            self._folder.rename(self.destination)
        except (OSError, SafetensorError) as error:
            raise self._refused(error) from error

    def _refused(self, error: BaseException) -> CheckpointError:
        free = shutil.disk_usage(self.destination.parent).free
        return CheckpointError(
            f"cannot write {self.destination}: {error}; {self.written:,} bytes of tensors were written, {free:,} bytes "
            "are free there; nothing was kept, make room or name another disk"
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
