"""The files of a checkpoint: every structural fault is found, all of them in one error, and data stays unread."""

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import anonymous_bytes
from safetensors.torch import load_file, save_file

from dsv4.checkpoint.reader import INDEX_NAME, Checkpoint
from dsv4.errors import CheckpointError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.arange(4, dtype=torch.uint8).view(torch.float8_e8m0fnu),
    "c": torch.tensor([-1, 1], dtype=torch.int8),
    "d": torch.ones(5, dtype=torch.bfloat16),
}


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two good shards, a and b in the first, c and d in the second."""
    save_file({n: TENSORS[n] for n in "ab"}, tmp_path / FIRST)
    save_file({n: TENSORS[n] for n in "cd"}, tmp_path / SECOND)
    write_index(tmp_path, {"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND})
    return tmp_path


def raw_file(path: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_facts_are_those_of_the_files(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        facts = {name: (e.dtype, e.shape, e.nbytes, e.shard.name) for name, e in checkpoint.entries.items()}
        assert facts == {
            "a": ("F32", (2, 3), 24, FIRST),
            "b": ("F8_E8M0", (4,), 4, FIRST),
            "c": ("I8", (2,), 2, SECOND),
            "d": ("BF16", (5,), 10, SECOND),
        }
        assert torch.equal(checkpoint.tensor("a"), TENSORS["a"])
        assert torch.equal(checkpoint.tensor("d"), TENSORS["d"])


def test_e8m0_and_int8_come_as_bytes(folder: Path) -> None:
    """A numeric conversion would give 2^-127.. and -1 -> 255 only by luck of the cast."""
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.tensor("b").tolist() == [0, 1, 2, 3] and checkpoint.tensor("b").dtype == torch.uint8
        assert checkpoint.tensor("c").tolist() == [255, 1] and checkpoint.tensor("c").dtype == torch.uint8


def test_a_single_file_opens_by_folder_and_by_name(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert Checkpoint.open(tmp_path).entries.keys() == TENSORS.keys()
    assert Checkpoint.open(tmp_path / "model.safetensors").entries.keys() == TENSORS.keys()
    assert Checkpoint.open(str(tmp_path / "model.safetensors")).path == tmp_path


def test_data_is_mapped_not_read(tmp_path: Path) -> None:
    """Eight GiB of zeros that take no disk: opening and looking at a few values must not need them in memory."""
    size = 8 << 30
    raw_file(tmp_path / "model.safetensors", {"big": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}, b"")
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) + size)
    with Checkpoint.open(tmp_path) as checkpoint:
        before = anonymous_bytes()
        assert checkpoint.tensor("big")[[0, size // 2, size - 1]].tolist() == [0, 0, 0]
        assert anonymous_bytes() - before < 1 << 24


def test_a_cache_folder_leads_to_its_snapshot(folder: Path, tmp_path: Path) -> None:
    """models--org--name/{blobs, refs/main, snapshots/<revision>} with links into blobs, as the hub client leaves it."""
    cache = tmp_path / "models--org--name"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in (FIRST, SECOND, INDEX_NAME):
        shutil.copy(folder / file, blobs / file)
        (snapshot / file).symlink_to(f"../../blobs/{file}")
    assert Checkpoint.open(cache).path == snapshot
    (cache / "snapshots" / "def").mkdir()
    with pytest.raises(CheckpointError, match="2 snapshots and no refs/main"):
        Checkpoint.open(cache)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc\n")
    assert Checkpoint.open(cache).path == snapshot


def truncate(folder: Path) -> None:
    data = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(data[:-1])


def cut_header(folder: Path) -> None:
    (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:20])


def edit_index(**changes: str | None) -> Callable[[Path], None]:
    """Sets entries of the weight map; None removes one."""

    def edit(folder: Path) -> None:
        weight_map = {"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND} | changes
        write_index(folder, {name: file for name, file in weight_map.items() if file is not None})

    return edit


def replace_file(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def dangling(folder: Path) -> None:
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to("../../blobs/gone")


def in_both_shards(folder: Path) -> None:
    save_file({n: TENSORS[n] for n in "acd"}, folder / SECOND)


def unlisted_shard(folder: Path) -> None:
    save_file({"e": torch.ones(1)}, folder / "extra.safetensors")


def no_index(folder: Path) -> None:
    (folder / INDEX_NAME).unlink()


def pickles_only(folder: Path) -> None:
    for name in (FIRST, SECOND, INDEX_NAME):
        (folder / name).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    (folder / "consolidated.00.pth").write_bytes(b"PK\x03\x04")


def nothing_at_all(folder: Path) -> None:
    for name in (FIRST, SECOND, INDEX_NAME):
        (folder / name).unlink()


def header(**records: Any) -> Callable[[Path], None]:
    """The second shard rewritten by hand with this header before eight bytes of data."""
    return lambda folder: raw_file(folder / SECOND, records, bytes(8))


def entry(begin: int, end: int, dtype: str = "U8", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


FAULTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "truncated data": (truncate, [f"{SECOND}: truncated: 11 data bytes, its header needs 12; 1 tensors", "first is c"]),
    "truncated header": (cut_header, [f"{SECOND}: truncated or not a safetensors file (20 bytes"]),
    "empty file": (replace_file(SECOND, b""), [f"{SECOND}: truncated or not a safetensors file (0 bytes"]),
    "header is no JSON": (lambda f: raw_file(f / SECOND, b"{nonsense", b""), [f"{SECOND} header: not valid JSON"]),
    "header is a list": (lambda f: raw_file(f / SECOND, [1], b""), [f"{SECOND} header: expected a JSON object"]),
    "index is no JSON": (replace_file(INDEX_NAME, b"{"), [f"{INDEX_NAME}: not valid JSON"]),
    "index is no text": (replace_file(INDEX_NAME, b"\xff\xfe\x00"), [f"{INDEX_NAME}: not valid JSON"]),
    "index without map": (replace_file(INDEX_NAME, b'{"metadata": {}}'), ["expected a 'weight_map'"]),
    "index with numbers": (replace_file(INDEX_NAME, b'{"weight_map": {"a": 1}}'), ["expected a 'weight_map'"]),
    "index says a name twice": (
        replace_file(INDEX_NAME, f'{{"weight_map": {{"a": "{FIRST}", "a": "{FIRST}"}}}}'.encode()),
        [f"{INDEX_NAME}: 'a' appears twice"],
    ),
    "index names a tensor no shard has": (edit_index(e=FIRST), [f"e is said to be in {FIRST}, which does not hold it"]),
    "shard tensor not in the index": (edit_index(d=None), [f"d is in {SECOND} but the index does not list it"]),
    "missing shard": (lambda f: (f / SECOND).unlink(), [f"{SECOND}: missing shard; {INDEX_NAME} puts 2 tensors there"]),
    "duplicate tensor": (in_both_shards, [f"a: duplicate tensor, in {FIRST} and in {SECOND}"]),
    "dangling link": (dangling, [f"{SECOND}: dangling symbolic link to ../../blobs/gone", "repeat it"]),
    "git-lfs pointer": (
        replace_file(SECOND, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"),
        [f"{SECOND}: a git-LFS pointer of 65 bytes", "git lfs pull"],
    ),
    "pickles": (
        pickles_only,
        ["pytorch_model.bin: a pickle file can run code", "consolidated.00.pth: a pickle", "torch.save_file"],
    ),
    "pickle in the index": (edit_index(d="model.bin"), ["model.bin: a pickle file can run code"]),
    "pickle in disguise": (replace_file(SECOND, pickle.dumps([1, 2])), [f"{SECOND}: a pickle file can run code"]),
    "zip in disguise": (replace_file(SECOND, b"PK\x03\x04" + bytes(range(40))), [f"{SECOND}: a pickle file can"]),
    "path escape": (edit_index(d="../secret.safetensors"), ["'../secret.safetensors' leaves the folder"]),
    "absolute path": (edit_index(d="/dev/null"), ["'/dev/null' leaves the folder"]),
    "shard not in the index": (unlisted_shard, [f"extra.safetensors: in the folder but {INDEX_NAME} does not name it"]),
    "no index": (no_index, [f"2 .safetensors files but no {INDEX_NAME}"]),
    "nothing": (nothing_at_all, ["no .safetensors file and no"]),
    "unknown dtype": (header(c=entry(0, 8, "F7"), d=entry(0, 8)), ["c: unknown dtype 'F7'"]),
    "bad shape": (header(c=entry(0, 8, shape=[-8]), d=entry(0, 8)), ["c: shape [-8] is not a list of sizes"]),
    "bad offsets": (header(c=entry(0, 8), d=entry(8, 8) | {"data_offsets": [8]}), ["d: data_offsets [8]"]),
    "size is not shape": (header(c=entry(0, 8, "F32", [3]), d=entry(8, 8)), ["c: data_offsets hold 8 bytes, F32"]),
    "hole": (header(c=entry(0, 4), d=entry(5, 8)), ["d: begins at data byte 5, expected 4 (leaves a hole"]),
    "overlap": (header(c=entry(0, 4), d=entry(3, 8)), ["d: begins at data byte 3, expected 4 (overlaps"]),
    "trailing bytes": (header(c=entry(0, 4), d=entry(4, 6)), [f"{SECOND}: 2 bytes too many"]),
    "record is no object": (header(c=5, d=entry(0, 8)), ["c: header record is int"]),
    "two faults": (
        lambda f: (truncate(f), unlisted_shard(f)),
        [f"{SECOND}: truncated", "extra.safetensors: in the folder", "2 problems"],
    ),
    "two faulty shards": (
        lambda f: (cut_header(f), replace_file(FIRST, b"{")(f)),
        [f"{SECOND}: truncated", f"{FIRST}: truncated", "2 problems"],
    ),
}


@pytest.mark.parametrize("case", FAULTS, ids=[name.replace(" ", "-") for name in FAULTS])
def test_a_bad_folder_is_refused(folder: Path, case: str) -> None:
    spoil, expected = FAULTS[case]
    spoil(folder)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    message = str(caught.value)
    assert str(folder) in message
    for text in expected:
        assert text in message, f"{text!r} is not in:\n{message}"


def test_a_header_repeated_key_is_refused(folder: Path) -> None:
    raw_file(folder / SECOND, b'{"c": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "c": 1, "d": 2}', b"")
    with pytest.raises(CheckpointError, match="'c' appears twice"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["model.bin", "weights.pt"])
def test_a_pickle_given_by_name_is_refused(tmp_path: Path, name: str) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="pickle file can run code"):
        Checkpoint.open(tmp_path / name)


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        Checkpoint.open(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="no such file"):
        Checkpoint.open(tmp_path / "missing.safetensors")


def test_a_header_of_640_bytes_is_no_pickle(tmp_path: Path) -> None:
    """Its length field starts with the bytes 80 02, as a protocol 2 pickle does."""
    text = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode().ljust(640)
    raw_file(tmp_path / "model.safetensors", text, b"\7")
    assert (tmp_path / "model.safetensors").read_bytes()[:2] == b"\x80\x02"
    assert Checkpoint.open(tmp_path).tensor("a").tolist() == [7]


def test_what_the_library_refuses_is_refused(tmp_path: Path) -> None:
    """Whatever this reader lets through must also open with safetensors itself."""
    raw_file(tmp_path / "model.safetensors", {"__metadata__": {"format": 1}, "a": entry(0, 1)}, b"\7")
    with pytest.raises(CheckpointError, match="safetensors refuses it"):
        Checkpoint.open(tmp_path)


def test_good_files_agree_with_the_library(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        for file in (FIRST, SECOND):
            for name, tensor in load_file(folder / file).items():
                assert checkpoint.tensor(name).view(torch.uint8).tolist() == tensor.view(torch.uint8).tolist()
