"""`dsv4 quantize` refuses what it cannot do, names every reason, and leaves nothing behind."""

import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import SMALL, rewrite

from dsv4.checkpoint import Checkpoint, quantize
from dsv4.checkpoint.quantize import quantize_checkpoint
from dsv4.errors import CheckpointError
from dsv4.testing.checkpoints import write_random_checkpoint


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "source", tmp_path / "made"


def exists(source: Path, made: Path) -> Path:
    made.mkdir()
    return made


def dangling(source: Path, made: Path) -> Path:
    made.symlink_to("nowhere")
    return made


def inside(source: Path, made: Path) -> Path:
    return source / "nvfp4"


def linked_inside(source: Path, made: Path) -> Path:
    (made.parent / "link").symlink_to(source)
    return made.parent / "link" / "nvfp4"


REFUSED: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "exists": (exists, "exists; name a new folder"),
    "dangling link": (dangling, "exists; name a new folder"),
    "same path": (lambda source, made: source, "exists; name a new folder"),
    "same path, spelled otherwise": (lambda source, made: source / ".." / "source", "exists; name a new folder"),
    "inside the source": (inside, "lies inside the source"),
    "inside, by a link": (linked_inside, "lies inside the source"),
}


@pytest.mark.parametrize("case", REFUSED, ids=[name.replace(" ", "-") for name in REFUSED])
def test_a_destination_is_refused(paths: tuple[Path, Path], case: str) -> None:
    source, made = paths
    write_random_checkpoint(source, SMALL)
    prepare, message = REFUSED[case]
    target = prepare(source, made)
    before = sorted(source.parent.rglob("*"))
    with pytest.raises(CheckpointError, match=message):
        quantize_checkpoint(source, target)
    assert sorted(source.parent.rglob("*")) == before


def test_an_nvfp4_checkpoint_has_nothing_to_convert(paths: tuple[Path, Path]) -> None:
    source, made = paths
    write_random_checkpoint(source, SMALL, format="modelopt-all")
    with pytest.raises(CheckpointError, match=r"routed experts are NVFP4 already; --all-linear would"):
        quantize_checkpoint(source, made)
    with pytest.raises(CheckpointError, match="all large linears are NVFP4 already"):
        quantize_checkpoint(source, made, all_linear=True)


def test_every_width_that_cannot_be_nvfp4_is_named(paths: tuple[Path, Path]) -> None:
    source, made = paths
    write_random_checkpoint(source, SMALL | {"q_lora_rank": 40}, format="bf16")
    with pytest.raises(CheckpointError) as caught:
        quantize_checkpoint(source, made, all_linear=True)
    for name in ("layers.0.attn.wq_b", "layers.1.attn.wq_b", "layers.2.attn.wq_b", "layers.1.attn.indexer.wq_b"):
        assert f"{name}: K = 40 is not a multiple of 16" in str(caught.value)
    quantize_checkpoint(source, made)


def spoil_scales(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layers.2.ffn.experts.2.w2.scale"].view(torch.uint8)[0, 0] = 255
    tensors["layers.0.attn.wkv.scale"].view(torch.uint8)[0, 0] = 255


def test_a_faulty_source_leaves_nothing_behind(paths: tuple[Path, Path]) -> None:
    source, made = paths
    write_random_checkpoint(source, SMALL)
    rewrite(source, spoil_scales)
    with pytest.raises(CheckpointError, match=r"(?s)2 problems.*wkv\.scale: 1 of.*experts\.2\.w2\.scale: 1 of"):
        quantize_checkpoint(source, made)
    rewrite(source, lambda tensors: tensors.pop("norm.weight"))
    with pytest.raises(CheckpointError, match=r"norm\.weight: missing"):
        quantize_checkpoint(source, made)
    assert [path.name for path in made.parent.iterdir()] == ["source"]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_before_and_while_writing(
    paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, made = paths
    write_random_checkpoint(source, SMALL)
    with (
        largest_file(100_000),
        pytest.raises(CheckpointError, match=r"(?s)cannot write .*made.*bytes are free there; nothing was kept"),
    ):
        quantize_checkpoint(source, made, shard_bytes=150_000)
    assert [path.name for path in made.parent.iterdir()] == ["source"]
    usage = shutil.disk_usage(source)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"bytes needed, 1,000 free on that disk"):
        quantize_checkpoint(source, made)
    assert [path.name for path in made.parent.iterdir()] == ["source"]


def test_an_interrupt_leaves_nothing_behind(paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, made = paths
    write_random_checkpoint(source, SMALL)

    def interrupt(weights: Any) -> Any:
        assert [path for path in made.parent.iterdir() if path.name.startswith(".made.")]
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize, "to_nvfp4", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, made)
    assert [path.name for path in made.parent.iterdir()] == ["source"]


def test_the_destination_appears_in_one_step(paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first sight is a rename of a complete folder; a failure of that very step leaves nothing either."""
    source, made = paths
    write_random_checkpoint(source, SMALL)

    def fail(folder: Path, target: Path) -> None:
        if Path(target) != made:
            return rename(folder, target)
        assert (
            (folder / "config.json").exists() and "head.weight" in Checkpoint.open(folder).entries and not made.exists()
        )
        raise OSError(28, "No space left on device")

    rename = Path.rename
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(CheckpointError, match=r"cannot write .*No space left on device"):
        quantize_checkpoint(source, made)
    assert [path.name for path in made.parent.iterdir()] == ["source"]
