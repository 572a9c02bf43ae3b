"""Writes an NVFP4 checkpoint in ModelOpt's layout from a BF16 or official one, tensor by tensor.

Routed experts of the trunk become NVFP4 (MXFP4 by exact cast), with `all_linear` every large linear of the trunk; the
rest, draft blocks included, is carried over bit for bit under its official name.
"""

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsv4.checkpoint.faults import Faults
from dsv4.checkpoint.layout import Layout
from dsv4.checkpoint.load import NANO, joint_groups, open_source, progress_bar, read_linear, read_param
from dsv4.checkpoint.modelopt import MODELOPT
from dsv4.checkpoint.modelopt_config import PRODUCER, hf_quant_config, quantization_config
from dsv4.checkpoint.names import TensorSpec, canonical_name
from dsv4.checkpoint.official import FP8, MXFP4, PLAIN
from dsv4.checkpoint.pack import Conversion, to_nvfp4
from dsv4.checkpoint.plan import LinearPlan, LoadPlan, make_plan, stack_name
from dsv4.checkpoint.reader import Checkpoint
from dsv4.checkpoint.write import SHARD_BYTES, FolderWriter
from dsv4.config.parse import read_json
from dsv4.errors import CheckpointError
from dsv4.quant import nvfp4
from dsv4.quant.weights import Weight

REPORT_NAME = "quantize_report.json"
# What belongs to a model besides its weights and config; anything else in the folder is left behind.
SIDE_FILES = ("tokenizer*", "special_tokens_map.json", "generation_config.json", "encoding/**/*", "LICENSE*", "NOTICE*")
_LAYOUTS: dict[str, Layout] = {"nvfp4": MODELOPT, "mxfp4": MXFP4, "fp8": FP8, "bf16": PLAIN, "f32": PLAIN}


@dataclass
class QuantizeResult:
    """What was done, or for a dry run would be done; `conversions` is then empty. Bytes are those of tensors."""

    source: Path
    destination: Path
    converted: list[str]
    kept: dict[str, int]
    bytes_before: int
    bytes_after: int
    free_bytes: int
    side_files: list[str]
    dry_run: bool
    conversions: list[Conversion] = field(default_factory=list)


def quantize_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    all_linear: bool = False,
    dry_run: bool = False,
    progress: bool | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> QuantizeResult:
    """Writes `destination`, a new folder, and returns what became of every tensor.

    all_linear: attention, compressors, indexer, shared experts and lm head too (not: router gate, weights_proj, draft).
    Raises CheckpointError when the source is faulty, holds nothing to convert, or the destination exists, lies in the
    source or has no room; then nothing is left behind.
    """
    source = NANO if str(source) == "nano" else Path(source).expanduser()
    destination = Path(destination).expanduser()
    _check_paths(source, destination)
    faults = Faults()
    opened, config = open_source(source, faults)
    assert isinstance(opened, Checkpoint)
    mtp = any(canonical_name(name).startswith("mtp.") for name in opened.entries)
    plan = make_plan(opened, config, faults, mtp=mtp, mixed_experts=True)
    faults.raise_if_any(source)
    result = _survey(plan, opened.path, destination, all_linear, dry_run)
    if not result.converted:
        raise CheckpointError(
            f"{source}: nothing to convert: " + ("all large linears are" if all_linear else "its routed experts are")
            + " NVFP4 already" + ("" if all_linear else "; --all-linear would convert the other large linears")
        )  # fmt: skip
    if result.bytes_after > result.free_bytes:
        raise CheckpointError(
            f"{destination}: {result.bytes_after:,} bytes needed, {result.free_bytes:,} free on that disk; make room "
            "or name another disk"
        )
    if dry_run:
        return result
    with FolderWriter(destination, shard_bytes) as writer, progress_bar(progress) as bar:
        task = bar.add_task(f"quantising {source}", total=plan.nbytes)
        for nbytes in _convert(plan, set(result.converted), writer, faults, result.conversions):
            bar.advance(task, nbytes)
        faults.raise_if_any(source)
        for name in result.side_files:
            writer.copy(opened.path / name, name)
        keys = _quantization_keys(plan, set(result.converted), all_linear)
        data = read_json(opened.path / "config.json") | {"quantization_config": keys, "expert_dtype": "fp4"}
        writer.add_json("config.json", data)
        writer.add_json("hf_quant_config.json", hf_quant_config(keys))
        writer.add_json(REPORT_NAME, {"producer": PRODUCER, "weights": [asdict(c) for c in result.conversions]})
    return result


def _check_paths(source: Path, destination: Path) -> None:
    if destination.exists() or destination.is_symlink():
        raise CheckpointError(f"{destination} exists; name a new folder, dsv4 never overwrites a checkpoint")
    inside = (source if source.is_dir() else source.parent).resolve()
    if destination.resolve().is_relative_to(inside):
        raise CheckpointError(f"{destination} lies inside the source {inside}; name a folder elsewhere")


def _wanted(spec: TensorSpec, all_linear: bool) -> bool:
    trunk = not spec.block.startswith("mtp")
    return trunk and (spec.nvfp4 if all_linear else spec.role == "expert")


def _survey(plan: LoadPlan, folder: Path, destination: Path, all_linear: bool, dry_run: bool) -> QuantizeResult:
    """Sizes and names from the headers alone; linears that cannot become NVFP4 are reported all at once."""
    faults = Faults()
    converted, kept = [], {"parameters": len(plan.params)}
    after = sum(param.nbytes for param in plan.params)
    for linear in plan.linears:
        spec = linear.spec
        if linear.layout.signature(linear.parts) == "nvfp4" or not _wanted(spec, all_linear):
            label = linear.layout.label
            kept[label] = kept.get(label, 0) + 1
            after += linear.nbytes
        elif spec.shape[1] % nvfp4.GROUP:
            faults.add(f"{spec.name}: K = {spec.shape[1]} is not a multiple of {nvfp4.GROUP}: no NVFP4 possible")
        else:
            converted.append(spec.name)
            after += spec.numel // 2 + spec.numel // nvfp4.GROUP + 8  # codes, block scales, two factors
    faults.raise_if_any(folder)
    existing = next(parent for parent in destination.resolve().parents if parent.exists())
    return QuantizeResult(
        folder, destination, converted, kept, plan.nbytes, after, shutil.disk_usage(existing).free, _side_files(folder),
        dry_run,
    )  # fmt: skip


def _side_files(folder: Path) -> list[str]:
    found = {path for pattern in SIDE_FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder).as_posix() for path in found if "__pycache__" not in path.parts)


def _convert(
    plan: LoadPlan, converted: set[str], writer: FolderWriter, faults: Faults, report: list[Conversion]
) -> Iterator[int]:
    for param in plan.params:
        writer.add(param.spec.name, read_param(plan.source, param, plan.config, faults))
        yield param.nbytes
    for group in joint_groups(plan.linears):
        for name, weight in _read_group(plan, group, converted, faults, report).items():
            for suffix, tensor in _LAYOUTS[weight.format].encode(weight).items():
                writer.add(f"{name}.{suffix}", tensor)
        yield sum(linear.nbytes for linear in group)


def _read_group(
    plan: LoadPlan, group: list[LinearPlan], converted: set[str], faults: Faults, report: list[Conversion]
) -> dict[str, Weight]:
    read = {linear.spec.name: read_linear(plan.source, linear, faults) for linear in group}
    weights = {name: weight for name, weight in read.items() if weight is not None}
    wanted = {name: weight for name, weight in weights.items() if name in converted}
    if wanted:
        made, conversions = to_nvfp4(wanted)
        weights |= made
        report += conversions
    return weights


def _quantization_keys(plan: LoadPlan, converted: set[str], all_linear: bool) -> dict[str, Any]:
    modules: dict[str, None] = {}
    scale_formats = set()
    draft_kept = True
    for linear in plan.linears:
        name, signature = linear.spec.name, linear.layout.signature(linear.parts)
        if name in converted or signature == "nvfp4":
            modules[stack_name(name).rpartition(".")[0] if linear.spec.role == "expert" else name] = None
            draft_kept = draft_kept and not name.startswith("mtp.")
        elif linear.layout is FP8:
            scale_formats.add("float32" if signature.endswith("F32 scales") else "ue8m0")
    fp8 = None if not scale_formats else "float32" if "float32" in scale_formats else "ue8m0"
    return quantization_config(list(modules), all_linear=all_linear, fp8_scale_fmt=fp8, draft_kept=draft_kept)
