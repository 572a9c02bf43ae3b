"""Which stored tensor becomes what: the names of a checkpoint matched with the config, by headers alone.

`make_plan` finds every missing, extra, misshapen or mistyped tensor; load.py, quantize.py and `dsv4 inspect` follow it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

from torch import Tensor

from dsv4.checkpoint.compressed_tensors import COMPRESSED_TENSORS
from dsv4.checkpoint.faults import Faults
from dsv4.checkpoint.fused import SplitExperts
from dsv4.checkpoint.header import TensorEntry
from dsv4.checkpoint.layout import Layout, entry_faults
from dsv4.checkpoint.modelopt import MODELOPT
from dsv4.checkpoint.names import TensorSpec, canonical_name, expected_tensors, split_part
from dsv4.checkpoint.official import FP8, MXFP4, PLAIN
from dsv4.checkpoint.reader import TensorSource
from dsv4.config import ModelConfig
from dsv4.parallel.shard import Cut, Share, misfit, misfits

LAYOUTS: tuple[Layout, ...] = (COMPRESSED_TENSORS, MODELOPT, FP8, MXFP4, PLAIN)  # the first that owns the parts
_EXPERT = re.compile(r"\.experts\.\d+\.")
_PARAM_DTYPES = {"i64": ("I64", "I32")}


@dataclass(frozen=True)
class LinearPlan:
    """One linear weight [N, K] and the stored tensors it is made of, by suffix. cut: what is wanted of it."""

    spec: TensorSpec
    layout: Layout
    parts: dict[str, TensorEntry]
    cut: Cut | None = None

    @property
    def nbytes(self) -> int:
        """Stored bytes of what is wanted."""
        return sum(int(entry.nbytes * self._share(entry.shape)) for entry in self.parts.values())

    def of(self, stored: Tensor) -> Tensor:
        """What is wanted of one stored tensor, a view; factors of the whole weight stay."""
        if self.cut is None or stored.ndim < 2:
            return stored
        return self.cut.stored(stored, self.layout.step(self.cut.whole, stored.shape[self.cut.dim]))

    def _share(self, shape: tuple[int, ...]) -> Fraction:
        if self.cut is None or len(shape) < 2:
            return Fraction(1)
        stored = shape[self.cut.dim]
        step = self.layout.step(self.cut.whole, stored)
        return Fraction(-(-self.cut.stop // step) - self.cut.start // step, stored)


@dataclass(frozen=True)
class ParamPlan:
    """One tensor that is used as it is, or of which `cut` is wanted."""

    spec: TensorSpec
    entry: TensorEntry
    cut: Cut | None = None

    @property
    def nbytes(self) -> int:
        whole = self.entry.nbytes
        return whole if self.cut is None else whole * (self.cut.stop - self.cut.start) // self.cut.whole


@dataclass
class LoadPlan:
    """Everything to load, in the model's order.

    unused: on-disk names that are known but not asked for (`mtp.*`). found: all others by key and part ("" for a
    parameter), also those whose header faults keep them out of `linears` and `params`.
    """

    source: TensorSource
    config: ModelConfig
    linears: list[LinearPlan] = field(default_factory=list)
    params: list[ParamPlan] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    found: dict[str, dict[str, TensorEntry]] = field(default_factory=dict)
    share: Share = field(default_factory=Share)

    @property
    def experts(self) -> range:
        """The routed experts of a block that are wanted."""
        return self.share.experts(self.config.n_routed_experts)

    @property
    def nbytes(self) -> int:
        return sum(plan.nbytes for plan in self.items())

    def items(self) -> Iterator[LinearPlan | ParamPlan]:
        yield from self.params
        yield from self.linears


def stack_name(name: str) -> str:
    """The key under which a linear is loaded: `layers.3.ffn.experts.17.w1` goes into `layers.3.ffn.experts.w1`."""
    return _EXPERT.sub(".experts.", name)


def make_plan(
    source: TensorSource,
    config: ModelConfig,
    faults: Faults,
    *,
    mtp: bool = False,
    mixed_experts: bool = False,
    share: Share = Share(),
) -> LoadPlan:
    """The plan to load `source`; every header fault goes to `faults` and leaves that tensor out of the plan.

    mtp: the draft blocks are wanted; else their tensors are `unused`, whatever they are.
    mixed_experts: experts of one projection may differ in format (they will be converted to one).
    share: the rank's part is wanted; a dimension that cannot be divided so is a fault. Experts divided by number are
    all looked at, and those of other ranks left out of the plan.
    """
    for text in misfits(config, share):
        faults.add(text)
    source = SplitExperts(source)
    expected = expected_tensors(config, mtp)
    plan = LoadPlan(source, config, share=share)
    _collect(plan, expected, mtp, faults)
    # Listed by the index, but in a shard whose header cannot be read: reported with that shard, not as missing.
    lost = {split_part(canonical_name(name))[0] for name in source.unreadable if name not in source.entries}
    for name, spec in expected.items():
        parts = plan.found.get(name, {})
        if name in lost:
            continue
        if not parts:
            if not source.unknown:
                faults.add(f"{spec.weight_name}: missing, expected shape {list(spec.shape)}")
        elif spec.role == "param":
            _plan_param(plan, spec, parts[""], faults)
        else:
            _plan_linear(plan, spec, parts, faults)
    if not mixed_experts:
        _check_stacks(plan.linears, faults)
    if share.by_expert:  # the headers of all have been looked at
        plan.linears = [x for x in plan.linears if x.spec.role != "expert" or x.spec.expert in plan.experts]
    return plan


def _collect(plan: LoadPlan, expected: dict[str, TensorSpec], mtp: bool, faults: Faults) -> None:
    """Fills `plan.found` and `plan.unused`; extra names and names that mean the same are faults."""
    found = plan.found
    for name, entry in plan.source.entries.items():
        canonical = canonical_name(name)
        if canonical.startswith("mtp.") and not mtp:
            plan.unused.append(name)
            continue
        key, part = split_part(canonical)
        if key not in expected:
            faults.add(f"{name}: extra tensor ({entry.dtype} {list(entry.shape)}), the config has no place for it")
        elif part in found.setdefault(key, {}):
            faults.add(f"{name}: duplicate, {found[key][part].name} is the same tensor")
        else:
            found[key][part] = entry


def _plan_param(plan: LoadPlan, spec: TensorSpec, entry: TensorEntry, faults: Faults) -> None:
    found = entry_faults(entry, _PARAM_DTYPES.get(spec.stored, ("BF16", "F32")), (spec.shape,))
    for fault in found:
        faults.add(fault)
    if not found:
        plan.params.append(ParamPlan(spec, entry, spec.cut(plan.share)))


def _plan_linear(plan: LoadPlan, spec: TensorSpec, parts: dict[str, TensorEntry], faults: Faults) -> None:
    layout = next((layout for layout in LAYOUTS if layout.owns(parts)), None)
    if layout is None:
        stored = ", ".join(f"{suffix} {entry.dtype}" for suffix, entry in parts.items())
        faults.add(
            f"{spec.name}: no known way to store a weight ({stored}); expected `weight` in BF16 or F32, in F8_E4M3 "
            "with a `scale`, in I8 or U8 with a `scale` (MXFP4) or a `weight_scale_2` (NVFP4), or `weight_packed`"
        )
        return
    found = layout.header_faults(spec.name, (spec.shape[0], spec.shape[1]), parts)
    for fault in found:
        faults.add(fault)
    if found:
        return
    cut = spec.cut(plan.share)
    trouble = None if cut is None else misfit(cut, layout.signature(parts).split()[0])
    if trouble is not None:
        below = spec.name.removeprefix(f"{spec.block}.")  # every block is alike
        faults.add(f"{_EXPERT.sub('.experts.*.', below)}: {trouble}")
    plan.linears.append(LinearPlan(spec, layout, parts, cut))


def _check_stacks(linears: list[LinearPlan], faults: Faults) -> None:
    """Experts of one projection are stacked, so they must be stored alike."""
    stacks: dict[str, dict[str, list[str]]] = {}
    for linear in linears:
        if linear.spec.role == "expert":
            kinds = stacks.setdefault(stack_name(linear.spec.name), {})
            kinds.setdefault(linear.layout.signature(linear.parts), []).append(linear.spec.name.split(".")[-2])
    for key, kinds in stacks.items():
        if len(kinds) > 1:
            what = "; ".join(f"{kind}: experts {', '.join(experts)}" for kind, experts in kinds.items())
            faults.add(f"{key}: experts stored in different formats ({what}); load with weights='nvfp4' to unify them")
