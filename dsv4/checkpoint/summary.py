"""Everything `dsv4 inspect` says about a model, as one JSON document whose keys carry their units.

From a config alone: parameters, bytes under each weight scheme, bytes one token reads, KV cache. From a folder, also
what its headers say is stored, component by component and format by format, what would stay unused, what is wrong.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from dsv4.checkpoint.faults import Faults
from dsv4.checkpoint.load import open_source
from dsv4.checkpoint.plan import LinearPlan, LoadPlan, ParamPlan, make_plan
from dsv4.checkpoint.sizes import COMPONENTS, Read, Sizes, component_of, count, kv_bytes, kv_sizes, sum_read
from dsv4.checkpoint.synthetic import shortened
from dsv4.config import ModelConfig
from dsv4.errors import ConfigError

LONG_CONTEXT = 131072  # KV bytes are given at this length and at the model's longest
Document = dict[str, Any]


def summarize(path: str, layers: int | None = None) -> Document:
    """The document of `random:<name>` or of a checkpoint folder or file; reads headers, never tensor data. `layers`:
    of a `random:<name>`, the first so many.

    Raises ConfigError for a config that cannot be read, CheckpointError where there is nothing to look at. Faults of
    files and tensors do not raise: they are listed under `problems`, beside what could be read.
    """
    if path.startswith("random:"):
        config = shortened(ModelConfig.from_name(path), layers)
        return {"source": path, **summarize_config(config), "checkpoint": None, "problems": []}
    if layers is not None:
        raise ConfigError(f"layers = {layers} shortens a random:... model; {path} is described whole")
    faults = Faults()
    source, config = open_source(path, faults)
    plan = make_plan(source, config, faults, mixed_experts=True)
    return {
        "source": path,
        **summarize_config(config),
        "checkpoint": summarize_plan(plan),
        "problems": list(faults.items),
    }


def summarize_config(config: ModelConfig) -> Document:
    """The parts that follow from the config: config, parameters, resident_bytes, decode_floor_per_token,
    kv_cache."""
    sizes = count(config)
    return {
        "config": _config(config),
        "parameters": _parameters(sizes),
        "resident_bytes": {scheme: _resident(parts) for scheme, parts in sizes.resident.items()},
        "decode_floor_per_token": {scheme: _read(read) for scheme, read in sizes.read.items()},
        "kv_cache": _kv_cache(config),
    }


def _config(config: ModelConfig) -> Document:
    fields: Document = dataclasses.asdict(dataclasses.replace(config, quantization=None))
    counts: Document = {str(kind): number for kind, number in config.layer_counts.items()}
    fields |= {
        "layers": counts | {"hash": sum(layer.hash for layer in config.layers)},
        "compress_ratios": [layer.ratio for layer in config.layers],
        "draft_stages": len(config.mtp_layers),
        "quantization": config.quantization.label if config.quantization else None,
    }
    return {key: value for key, value in fields.items() if key != "mtp_layers"}


def _parameters(sizes: Sizes) -> Document:
    return {
        "by_component_params": {name: number for name, number in sizes.parameters.items() if name != "hash_table"},
        "trunk_params": sizes.trunk,
        "draft_params": sizes.draft,
        "trunk_and_draft_params": sizes.trunk + sizes.draft,
        "active_params_per_token": sizes.active,
        "active_linears_by_component_params": sizes.active_linears,
        "active_linears_params": sum(sizes.active_linears.values()),
        "draft_step_linears_params": sizes.draft_step_linears,
    }


def _resident(parts: dict[str, int]) -> Document:
    return {
        "by_component_bytes": parts,
        "trunk_bytes": sum(parts.values()) - parts["draft"],
        "draft_bytes": parts["draft"],
    }


def _read(read: Read) -> Document:
    return {
        "linears_by_component_bytes": read.linears,
        "linears_bytes": sum(read.linears.values()),
        "mhc_bytes": read.mhc,
        "linears_and_mhc_bytes": read.floor,
        "other_bytes": read.other,
        "total_bytes": read.total,
    }


def _kv_cache(config: ModelConfig) -> Document:
    unit = kv_sizes(config)
    contexts = {}
    for tokens in sorted({min(LONG_CONTEXT, config.max_position_embeddings), config.max_position_embeddings}):
        parts = kv_bytes(config, tokens)
        fp8_index, read = parts.pop("index_keys_fp8"), parts.pop("read_per_token")
        total = sum(parts.values())
        contexts[str(tokens)] = {
            **{f"{name}_bytes": nbytes for name, nbytes in parts.items()},
            "total_bytes": total,
            "total_fp8_index_bytes": total - parts["index_keys"] + fp8_index,
            "read_bytes_per_token": read,
        }
    return {
        "entry_bytes": unit.entry,
        "index_key_bytes": unit.index_key,
        "index_key_fp8_bytes": unit.index_key_fp8,
        "bytes_per_token": unit.per_token,
        "window_bytes_per_sequence": unit.windows,
        "state_bytes_per_sequence": unit.states,
        "context_tokens": contexts,
    }


# ------------------------------------------------------------------------------------------------ from the headers


def summarize_plan(plan: LoadPlan) -> Document:
    """What is stored: bytes and parameters by component and format, what one token reads of it, what stays unused."""
    entries = plan.source.entries
    shards = {entry.shard for entry in entries.values()}
    components = {name: formats for name, formats in _stored(plan.items()).items() if formats}
    read = sum_read(((item.spec, item.nbytes) for item in plan.items()), plan.config)
    return {
        "files": len(shards),
        "tensors": len(entries),
        "stored_bytes": sum(entry.nbytes for entry in entries.values()),
        "loaded_bytes": plan.nbytes,
        "components": components,
        "formats": _total(components.values()),
        "draft": _total(_draft(plan).values()),
        "unused": {
            "tensors": len(plan.unused),
            "stored_bytes": sum(entries[name].nbytes for name in plan.unused if name in entries),
            "names": dict(Counter(_pattern(name) for name in plan.unused)),
        },
        "decode_floor_per_token": _read(read),
    }


def _draft(plan: LoadPlan) -> dict[str, Document]:
    """The `mtp.*` tensors by format, as far as they make whole weights."""
    if not plan.unused or not plan.config.mtp_layers:
        return {}
    whole = make_plan(plan.source, plan.config, Faults(), mtp=True, mixed_experts=True)
    return _stored(item for item in whole.items() if item.spec.block.startswith("mtp."))


def _stored(items: Iterable[LinearPlan | ParamPlan]) -> dict[str, Document]:
    """{component: {format: {tensors, params, stored_bytes}}}; a linear with its scales counts as one tensor."""
    components: dict[str, Document] = {name: {} for name in COMPONENTS}
    for item in items:
        form = (
            item.layout.signature(item.parts).split()[0] if isinstance(item, LinearPlan) else item.entry.dtype.lower()
        )
        cell = components[component_of(item.spec)].setdefault(form, {"tensors": 0, "params": 0, "stored_bytes": 0})
        cell["tensors"] += 1
        cell["params"] += item.spec.numel if item.spec.component != "hash_table" else 0
        cell["stored_bytes"] += item.nbytes
    return components


def _total(components: Iterable[Document]) -> Document:
    formats: dict[str, Counter[str]] = {}
    for cells in components:
        for form, cell in cells.items():
            formats.setdefault(form, Counter()).update(cell)
    return {form: dict(cell) for form, cell in sorted(formats.items())}


def _pattern(name: str) -> str:
    """`mtp.0.ffn.experts.17.w1.weight` -> `mtp.0.ffn.experts.*.w1.weight`, so that a list stays readable."""
    return re.sub(r"\.experts\.\d+\.", ".experts.*.", name)
