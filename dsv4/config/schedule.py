"""Which layer is what: attention kind, compress ratio and hash routing, in DeepSeek's or transformers' words."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from dsv4.config.findings import Findings, Reader, show
from dsv4.config.spec import LayerKind

KINDS_OF_TRANSFORMERS: dict[str, LayerKind] = {
    "sliding_attention": "window",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}
CSA_RATIO = 4  # DeepSeek's code gives overlap and indexer to exactly this ratio
Kind = tuple[LayerKind, int]


def kind_of_ratio(ratio: int) -> Kind | None:
    """Attention kind of an official compress ratio, or None for one that V4 does not have (1 and 2 are V4.1's)."""
    if ratio == 0:
        return "window", 0
    if ratio == CSA_RATIO:
        return "csa", ratio
    return ("hca", ratio) if ratio > CSA_RATIO else None


def parse_kinds(data: Mapping[str, Any], trunk: int, stages: int, findings: Findings) -> list[Kind] | None:
    """One (kind, ratio) per trunk layer. `stages` draft blocks must follow them in the official list, as zeros."""
    if "layer_types" not in data and "compress_ratios" not in data:
        findings.add("compress_ratios", "no such key", "compress_ratios (DeepSeek) or layer_types (transformers)")
        return None
    official = transformers = None
    if "compress_ratios" in data:
        official = _official(data, trunk, stages, findings)
    if "layer_types" in data:
        transformers = _transformers(data, trunk, findings)
    if official and transformers and official != transformers:
        layer = next(i for i, pair in enumerate(zip(official, transformers, strict=True)) if pair[0] != pair[1])
        findings.add(
            f"layer_types[{layer}]",
            "{} at ratio {}".format(*transformers[layer]),
            "{} at ratio {}, as compress_ratios says".format(*official[layer]),
            "keep the list that is right",
        )
    return transformers or official


def _official(data: Mapping[str, Any], trunk: int, stages: int, findings: Findings) -> list[Kind] | None:
    what = f"one integer per trunk layer ({trunk}), then one per draft stage ({stages})"
    ratios = Reader(data, findings).listing("compress_ratios", what, trunk + stages, int)
    if ratios is None:
        return None
    kinds = []
    for layer, ratio in enumerate(ratios):
        kind = kind_of_ratio(ratio)
        if kind is None or (layer >= trunk and ratio != 0):
            expected = "0: draft stages see the window only" if layer >= trunk else "0, 4 or more than 4"
            findings.add(f"compress_ratios[{layer}]", str(ratio), expected)
            kind = None
        kinds.append(kind)
    return [kind for kind in kinds[:trunk] if kind is not None] if None not in kinds else None


def _transformers(data: Mapping[str, Any], trunk: int, findings: Findings) -> list[Kind] | None:
    names = Reader(data, findings).listing("layer_types", f"one name per layer ({trunk})", trunk, str)
    if names is None:
        return None
    rates: dict[str, Any] = {"sliding_attention": 0}
    given = data.get("compress_rates")
    if given is not None and not isinstance(given, Mapping):
        findings.add("compress_rates", show(given), "a dict from layer type to tokens per entry")
        return None
    for name, legacy in (("compressed_sparse_attention", "csa"), ("heavily_compressed_attention", "hca")):
        rates[name] = data.get(f"compress_rate_{legacy}", (given or {}).get(name))
    for name in sorted(set(given or {}) - set(KINDS_OF_TRANSFORMERS)):
        findings.add(f"compress_rates.{name}", show((given or {})[name]), "one of the two compressed layer types")
    for name in sorted(set(names)):
        if name not in KINDS_OF_TRANSFORMERS:
            findings.add("layer_types", show(name), "one of " + ", ".join(KINDS_OF_TRANSFORMERS))
        elif name != "sliding_attention":
            Reader(rates, findings, "compress_rates.").integer(name, 2) if rates[name] is not None else findings.add(
                f"compress_rates.{name}", "no such key", "the tokens per entry of these layers"
            )
    if not all(isinstance(rates.get(name), int) and name in KINDS_OF_TRANSFORMERS for name in names):
        return None
    return [(KINDS_OF_TRANSFORMERS[name], rates[name]) for name in names]


def parse_hash(data: Mapping[str, Any], trunk: int, findings: Findings) -> Container[int] | None:
    """The layers whose experts come from the token table: the first num_hash_layers, or those mlp_layer_types names."""
    reader = Reader(data, findings)
    if "mlp_layer_types" not in data:
        count = reader.integer("num_hash_layers", 0)
        if count is not None and count > trunk:
            findings.add("num_hash_layers", str(count), f"at most num_hidden_layers = {trunk}")
        return None if count is None else range(count)
    names = reader.listing("mlp_layer_types", f"one of 'hash_moe', 'moe' per layer ({trunk})", trunk, str)
    if names is None:
        return None
    for name in sorted(set(names) - {"hash_moe", "moe"}):
        findings.add("mlp_layer_types", show(name), "'hash_moe' or 'moe'")
    return {layer for layer, name in enumerate(names) if name == "hash_moe"}
