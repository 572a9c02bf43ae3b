"""Bytes a step must move, counted from what is stored: the denominator of every share that a bench prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsv4.checkpoint.faults import Faults
from dsv4.checkpoint.load import Policy, open_source
from dsv4.checkpoint.names import TensorSpec
from dsv4.checkpoint.plan import make_plan
from dsv4.checkpoint.sizes import SCHEMES, format_bytes, kv_bytes, kv_sizes
from dsv4.checkpoint.synthetic import SYNTHETIC, form_of, shortened, stacked
from dsv4.config import ModelConfig
from dsv4.kvcache import KVCache
from dsv4.parallel.shard import Share

Stored = list[tuple[TensorSpec, int]]  # every tensor with its bytes; the experts of a layer may be one entry or many


@dataclass(frozen=True)
class StepBytes:
    """What one step reads: linears without routed experts, routed experts, mHC, other parameters, KV cache."""

    linears: int
    experts: int
    mhc: int
    other: int
    kv: int

    @property
    def total(self) -> int:
        return self.linears + self.experts + self.mhc + self.other + self.kv


def stored_bytes(name: str, policy: Policy, layers: int | None = None, share: Share = Share()) -> Stored:
    """The trunk's tensors as a rank's `load(name, weights=policy, layers=layers)` holds them; reads headers at most."""

    def held(spec: TensorSpec, form: str) -> int:
        cut = spec.cut(share)
        return format_bytes(spec.shape if cut is None else cut.shape(spec.shape), form)

    if name in SYNTHETIC:
        config = shortened(ModelConfig.from_name(name), layers)
        every = stacked(config).values()
        return [(spec, held(spec, form_of(spec, policy)) * max(len(share.experts(n)), 1)) for spec, n in every]
    faults = Faults()
    source, config = open_source(name, faults)
    plan = make_plan(source, config, faults, mixed_experts=True, share=share)
    faults.raise_if_any(name)
    if policy == "native":
        return [(item.spec, item.nbytes) for item in plan.items()]
    form = SCHEMES["nvfp4"]
    return [
        (item.spec, held(item.spec, "nvfp4") if form(item.spec) == "nvfp4" else item.nbytes) for item in plan.items()
    ]


def expected_distinct(config: ModelConfig, rows: int) -> float:
    """Experts of one layer that `rows` tokens touch if each takes its K of E at random."""
    miss = 1 - config.num_experts_per_tok / config.n_routed_experts
    return config.n_routed_experts * (1 - miss**rows)


def step_bytes(
    stored: Stored, config: ModelConfig, cache: KVCache, rows: int, context: int, distinct: Sequence[float]
) -> StepBytes:
    """Of a decode step of `rows` sequences with `context` tokens each; distinct: experts touched, by layer."""
    linears = mhc = other = 0
    experts = 0.0
    for spec, nbytes in stored:
        if spec.role == "expert":
            experts += nbytes * distinct[int(spec.block.split(".")[1])] / config.n_routed_experts
        elif spec.role == "linear":
            linears += nbytes
        elif spec.component == "mhc":
            mhc += nbytes
        elif spec.component in ("embedding", "hash_table"):
            other += nbytes // config.vocab_size * rows
        else:
            other += nbytes
    return StepBytes(linears, round(experts), mhc, other, rows * kv_read_bytes(config, cache, context))


def kv_read_bytes(config: ModelConfig, cache: KVCache, context: int) -> int:
    """Cache bytes one more token of one sequence reads: its windows, top-k entries and index keys, HCA entries."""
    total = 0
    for spec, layer in zip(config.layers, cache.layers, strict=True):
        entry = layer.ring.shape[-1] * layer.ring.element_size()
        entries = context // spec.ratio if spec.ratio else 0
        total += min(context, config.sliding_window) * entry
        if spec.kind == "csa":
            key = layer.index_pool.shape[-1] * layer.index_pool.element_size()
            total += min(entries, config.index_topk) * entry + entries * key
        else:
            total += entries * entry
    return total


def predicted_bytes(stored: Stored, config: ModelConfig, rows: int, tokens: int) -> int:
    """Memory by `dsv4 inspect`'s figures: the trunk's weights and the cache of `rows` sequences of `tokens` tokens."""
    unit, parts = kv_sizes(config), kv_bytes(config, tokens)
    cache = parts["csa"] + parts["index_keys"] + parts["hca"] + unit.windows + unit.states
    return sum(nbytes for _, nbytes in stored) + rows * cache
