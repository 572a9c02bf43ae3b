"""The rotary part of a config: official `rope_scaling`, or transformers' nested `rope_parameters`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv4.config.findings import Findings, Reader, show
from dsv4.config.spec import YarnScaling

_YARN_KEYS = {"type", "rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
# What transformers adds around the YaRN numbers: two that are read elsewhere, and some that must be neutral.
_NESTED_KEYS = {"rope_theta", "partial_rotary_factor"}
_NEUTRAL: dict[str, Any] = {"attention_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "truncate": True}


def parse_rope(data: Mapping[str, Any], findings: Findings) -> tuple[float | None, float | None, YarnScaling | None]:
    """(rope_theta, compress_rope_theta, scaling of the compressed layers); None where a finding was added."""
    nested = data.get("rope_parameters")
    reader = Reader(data, findings)
    if nested is None:
        theta, compress_theta = reader.positive("rope_theta"), reader.positive("compress_rope_theta")
        if "rope_scaling" not in data:
            findings.add("rope_scaling", "no such key", "a YaRN dict, or null for plain RoPE")
            return theta, compress_theta, None
        scaling = data["rope_scaling"]
        return theta, compress_theta, None if scaling is None else _scaling(scaling, "rope_scaling", set(), findings)

    if not (isinstance(nested, Mapping) and set(nested) == {"main", "compress"}
            and all(isinstance(part, Mapping) for part in nested.values())):  # fmt: skip
        findings.add("rope_parameters", show(nested), "two dicts, 'main' and 'compress', as transformers writes them")
        return None, None, None
    # transformers computes with the nested values; the flat rope_theta beside them is a leftover default.
    theta = Reader(nested["main"], findings, "rope_parameters.main.").positive("rope_theta")
    compress_theta = Reader(nested["compress"], findings, "rope_parameters.compress.").positive("rope_theta")
    if _scaling(nested["main"], "rope_parameters.main", _NESTED_KEYS, findings) is not None:
        findings.add("rope_parameters.main", "yarn", "rope_type 'default': window layers are never scaled")
    return theta, compress_theta, _scaling(nested["compress"], "rope_parameters.compress", _NESTED_KEYS, findings)


def parse_rope_dims(data: Mapping[str, Any], head_dim: int | None, findings: Findings) -> int | None:
    """qk_rope_head_dim, given directly or as partial_rotary_factor times head_dim; all given values must agree."""
    nested = data.get("rope_parameters")
    parts = [part for part in nested.values() if isinstance(part, Mapping)] if isinstance(nested, Mapping) else []
    sources = [("partial_rotary_factor", data)] + [("rope_parameters: partial_rotary_factor", part) for part in parts]
    factors = {
        label: source["partial_rotary_factor"]
        for label, source in sources
        if source.get("partial_rotary_factor") is not None
    }
    if "qk_rope_head_dim" in data or not factors:
        dims = Reader(data, findings).integer("qk_rope_head_dim", 2)
    else:
        factor = Reader({"partial_rotary_factor": next(iter(factors.values()))}, findings).positive(
            "partial_rotary_factor"
        )
        # 24 * (8 / 24) may land just below 8
        dims = None if factor is None or head_dim is None else int(head_dim * factor + 1e-6)
    if dims is None or head_dim is None:
        return None
    for label, factor in factors.items():
        number = isinstance(factor, int | float) and 0 < factor <= 1
        if not number or dims != int(head_dim * factor + 1e-6):
            findings.add(label, show(factor), f"{dims}/{head_dim} (qk_rope_head_dim / head_dim)")
    if dims % 2:
        findings.add("qk_rope_head_dim", str(dims), "an even number: RoPE turns pairs")
    if dims > head_dim:
        findings.add("qk_rope_head_dim", str(dims), f"at most head_dim = {head_dim}")
    return dims


def _scaling(part: Any, where: str, extra: set[str], findings: Findings) -> YarnScaling | None:
    """The YaRN numbers of one rope dict, or None when it asks for plain RoPE or is wrong (then with findings)."""
    if not isinstance(part, Mapping):
        findings.add(where, show(part), "a dict or null")
        return None
    kind = part.get("rope_type", part.get("type"))
    for key in sorted(set(part) - _YARN_KEYS - extra - set(_NEUTRAL)):
        findings.add(f"{where}.{key}", show(part[key]), "no such key", "remove it if it is harmless")
    for key, value in _NEUTRAL.items():
        if key in part and part[key] is not None and part[key] != value:
            findings.add(f"{where}.{key}", show(part[key]), f"{value} or absent: DeepSeek-V4 scales no cos/sin")
    if kind == "default":
        return None
    if kind != "yarn":
        findings.add(f"{where}.rope_type", show(kind), "'yarn' or 'default'")
        return None
    reader = Reader({"beta_fast": 32, "beta_slow": 1} | dict(part) if extra else part, findings, where + ".")
    factor, fast, slow = reader.positive("factor"), reader.positive("beta_fast"), reader.positive("beta_slow")
    original = reader.integer("original_max_position_embeddings", 1)
    if factor is None or original is None or fast is None or slow is None:
        return None
    if factor < 1:
        findings.add(f"{where}.factor", show(factor), "at least 1")
    if fast <= slow:
        findings.add(f"{where}.beta_fast", show(fast), f"more than beta_slow = {slow:g}")
    return YarnScaling(factor, original, fast, slow)
