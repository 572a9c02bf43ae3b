"""From a checkpoint to the weights of the model: checked as a whole first, then read tensor by tensor."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from dsv4.checkpoint.faults import Faults
from dsv4.checkpoint.header import TensorEntry
from dsv4.checkpoint.layout import value_faults
from dsv4.checkpoint.pack import Conversion, Stack, place, to_nvfp4
from dsv4.checkpoint.plan import LinearPlan, LoadPlan, ParamPlan, make_plan, stack_name
from dsv4.checkpoint.random import memory_checkpoint
from dsv4.checkpoint.reader import Checkpoint, TensorSource
from dsv4.checkpoint.synthetic import SYNTHETIC, check_capacity, shortened, synthesize, synthetic_bytes
from dsv4.config import ModelConfig
from dsv4.errors import CheckpointError, ConfigError
from dsv4.parallel.shard import Share, misfits
from dsv4.quant.weights import Weight

Policy = Literal["native", "nvfp4"]
POLICIES = ("native", "nvfp4")
NANO = Path(__file__).resolve().parents[1] / "models" / "nano"
_WEIGHT_DATA = ("weight", "weight_packed")


class LoadedModel(NamedTuple):
    """weights: by canonical key. folder: where the tokenizer and config.json lie; None for weights without a file."""

    config: ModelConfig
    weights: dict[str, Weight | Tensor]
    folder: Path | None


def load_model_weights(
    path: str | Path | TensorSource,
    *,
    policy: Policy = "native",
    device: torch.device | str = "cpu",
    progress: bool | None = None,
    mtp: bool = False,
    report: list[Conversion] | None = None,
    layers: int | None = None,
    share: Share = Share(),
) -> LoadedModel:
    """The config, every weight by canonical key, and the folder they came from.

    Linears are `Weight`s by module path (`layers.0.attn.wq_a`); the rank's routed experts are stacked [E, N, K] under
    `layers.L.ffn.experts.w1|w2|w3`; everything else is a tensor by its full name, F32 where DeepSeek stores F32.

    path: checkpoint folder, .safetensors file, open checkpoint, "nano" (the embedded model), "random:tiny" (written
    down in memory and read) or "random:flash", "random:pro" (made on `device`, see synthetic.py).
    policy: "native" keeps every format; "nvfp4" makes NVFP4 of every large linear, MXFP4 by exact cast.
    progress: a bar on stderr; None shows it on a terminal only. mtp: load the draft blocks too.
    report: gets one `Conversion` per linear that the policy covers. layers: of random:flash and random:pro, the first
    so many layers. share: of what ranks divide (`split` in names.py), the part that this one holds; only its bytes are
    read, except of weights that the policy converts, whose scales are of the whole.
    Peak memory is the result plus a few copies of the largest single weight. Raises ConfigError, CapacityError (made-up
    weights that do not fit) or CheckpointError, which lists every fault of files, names, shapes, dtypes and scales.
    """
    if policy not in POLICIES:
        raise CheckpointError(f"policy {policy!r} is unknown; expected one of {', '.join(POLICIES)}")
    if path in SYNTHETIC:
        return _synthetic(str(path), layers, policy, torch.device(device), progress, mtp, share)
    if layers is not None:
        raise ConfigError(f"layers = {layers} shortens {' and '.join(SYNTHETIC)}; {_label(path)} is loaded whole")
    faults = Faults()
    source, config = open_source(path, faults)
    plan = make_plan(source, config, faults, mtp=mtp, mixed_experts=policy == "nvfp4", share=share)
    if len(faults):
        _scan_values(plan, faults)
        faults.raise_if_any(_label(path))
    loader = _Loader(plan, policy, device, faults, report)
    with progress_bar(progress) as bar:
        task = bar.add_task(f"loading {_label(path)}", total=plan.nbytes)
        for nbytes in loader.steps():
            bar.advance(task, nbytes)
    faults.raise_if_any(_label(path))
    return LoadedModel(config, loader.weights, source.path if isinstance(source, Checkpoint) else None)


def _synthetic(
    name: str, layers: int | None, policy: Policy, device: torch.device, progress: bool | None, mtp: bool, share: Share
) -> LoadedModel:
    config = shortened(ModelConfig.from_name(name), layers)
    faults = Faults()
    for text in misfits(config, share):
        faults.add(text)
    faults.raise_if_any(name)
    check_capacity(name, config, policy, device, mtp, share)
    weights: dict[str, Weight | Tensor] = {}
    with progress_bar(progress) as bar:
        task = bar.add_task(f"making {name}", total=sum(synthetic_bytes(config, policy, mtp, share).values()))
        for key, weight in synthesize(config, policy, device, mtp=mtp, share=share):
            weights[key] = weight
            bar.advance(task, weight.nbytes)
    return LoadedModel(config, weights, None)


def open_source(path: str | Path | TensorSource, faults: Faults) -> tuple[TensorSource, ModelConfig]:
    """The tensors and config at `path`; faults of the files go to `faults`, so that the caller can add its own."""
    if isinstance(path, str) and path.startswith("random:"):
        source: TensorSource = memory_checkpoint(path)
    elif str(path) == "nano":
        source = Checkpoint.scan(NANO, faults)
    elif isinstance(path, str | Path):
        source = Checkpoint.scan(path, faults)
    else:
        source = path
    try:
        return source, source.config()
    except ConfigError as error:
        if not len(faults):
            raise
        faults.add(str(error))
        faults.raise_if_any(_label(path))
        raise


def read_linear(source: TensorSource, linear: LinearPlan, faults: Faults) -> Weight | None:
    """What is wanted of the weight, as stored, viewing the mapped file; None when its numbers are at fault."""
    parts = {suffix: linear.of(source.tensor(entry.name)) for suffix, entry in linear.parts.items()}
    before = len(faults)
    for suffix, tensor in parts.items():
        check_values(linear.parts[suffix], suffix, tensor, faults)
    return None if len(faults) > before else linear.layout.decode(parts)


def read_param(source: TensorSource, param: ParamPlan, config: ModelConfig, faults: Faults) -> Tensor:
    """What is wanted of the tensor, as stored, viewing the mapped file."""
    tensor = source.tensor(param.entry.name)
    if param.cut is not None:
        tensor = param.cut.of(tensor)
    check_values(param.entry, "", tensor, faults)
    if param.spec.stored == "i64" and tensor.numel():
        low, high = int(tensor.min()), int(tensor.max())
        if low < 0 or high >= config.n_routed_experts:
            faults.add(f"{param.entry.name}: expert ids {low}..{high}, expected 0..{config.n_routed_experts - 1}")
    return tensor


def check_values(entry: TensorEntry, suffix: str, tensor: Tensor, faults: Faults) -> None:
    """Adds what is wrong with the numbers of one stored tensor."""
    for fault in value_faults(suffix, tensor):
        faults.add(f"{entry.name}: {fault}")


class _Loader:
    """Executes a plan; faults in the numbers are collected, so that all are known at the end."""

    def __init__(
        self,
        plan: LoadPlan,
        policy: Policy,
        device: torch.device | str,
        faults: Faults,
        report: list[Conversion] | None,
    ) -> None:
        self.plan, self.policy, self.device, self.faults = plan, policy, device, faults
        self.report = report if report is not None else []
        self.weights: dict[str, Weight | Tensor] = {}
        self._stacks: dict[str, Stack] = {}

    def steps(self) -> Iterator[int]:
        """Loads one group of tensors per step and yields the stored bytes it had."""
        for param in self.plan.params:
            self._param(param)
            yield param.nbytes
        for group in joint_groups(self.plan.linears):
            self._group(group)
            yield sum(linear.nbytes for linear in group)
        if not len(self.faults):
            self.weights |= {key: stack.weight() for key, stack in self._stacks.items()}

    def _param(self, param: ParamPlan) -> None:
        tensor = read_param(self.plan.source, param, self.plan.config, self.faults)
        # Files saved in one dtype throughout hold these in BF16; widening is exact and spares the layers a case.
        dtype = {"f32": torch.float32, "i64": torch.int64}.get(param.spec.stored, tensor.dtype)
        self.weights[param.spec.name] = tensor.to(self.device, dtype, copy=True)

    def _group(self, group: list[LinearPlan]) -> None:
        convert = self.policy == "nvfp4" and group[0].spec.nvfp4
        wanted = [replace(linear, cut=None) for linear in group] if convert else group
        read = {linear.spec.name: read_linear(self.plan.source, linear, self.faults) for linear in wanted}
        weights = {name: weight for name, weight in read.items() if weight is not None}
        if len(weights) < len(read):
            return
        if convert:
            converted, conversions = to_nvfp4(weights)
            cuts = {linear.spec.name: linear.cut for linear in group}
            weights = {
                name: weight if (cut := cuts[name]) is None else cut.of(weight) for name, weight in converted.items()
            }
            self.report += conversions
        for name, weight in weights.items():
            key = stack_name(name)
            if key == name:
                self.weights[key] = place(weight, self.device)
            else:
                stack = self._stacks.setdefault(key, Stack(len(self.plan.experts), self.device))
                stack.put(self.plan.experts.index(int(name.split(".")[-2])), weight)


def joint_groups(linears: list[LinearPlan]) -> Iterator[list[LinearPlan]]:
    """Linears one by one, but w1 with its w3: they feed one GEMM, so their NVFP4 form shares its global."""
    by_name = {linear.spec.name: linear for linear in linears}
    for linear in linears:
        head, _, last = linear.spec.name.rpartition(".")
        if last == "w3" and f"{head}.w1" in by_name:
            continue
        partner = by_name.get(f"{head}.w3") if last == "w1" else None
        yield [linear] if partner is None else [linear, partner]


def _scan_values(plan: LoadPlan, faults: Faults) -> None:
    """Adds the faults of scales and parameters to those already found; bulk data is left alone, the load has failed."""
    for parts in plan.found.values():
        for suffix, entry in parts.items():
            if suffix not in _WEIGHT_DATA and entry.name not in plan.source.unreadable:
                check_values(entry, suffix, plan.source.tensor(entry.name), faults)


def _label(path: str | Path | TensorSource) -> str:
    return str(path) if isinstance(path, str | Path) else str(getattr(path, "path", "the checkpoint"))


def progress_bar(wanted: bool | None) -> Progress:
    """A bar on stderr, started as a context; None shows it only where someone watches."""
    show = sys.stderr.isatty() if wanted is None else wanted
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True, disable=not show)
