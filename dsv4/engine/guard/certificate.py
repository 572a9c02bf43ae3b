"""The certificate of one batch bucket: record a step's calls, read its graph, test for baked scalars, compare bits."""

from __future__ import annotations

import gc
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dsv4.engine.guard import bits, census, scalars
from dsv4.engine.guard.calls import CallLog
from dsv4.engine.guard.findings import BatchReport, Finding, merged
from dsv4.engine.guard.step import Step, Subject
from dsv4.engine.guard.watch import Watch
from dsv4.engine.guard.where import Where, places
from dsv4.errors import KernelError

_STEPS = 3  # recorded
_WORK = ("kernel", "memset")  # what an eager body or a stage may do
_CAPTURING = (*_WORK, "graph change", "tensor")
_CAPTURES = 2  # per length of the baked-scalar test
SHORT, LONG = 5, 300  # tokens: within a window and an HCA entry, and beyond both
Say = Callable[[str], None]


@torch.inference_mode()
def certify(subject: Subject, rows: int, say: Say = lambda text: None) -> BatchReport:
    """What a step of `rows` rows does, and whether it is quiet. KernelError where this machine cannot tell."""
    prove_recorder()
    report, step = BatchReport(rows), subject.step(rows)
    tokens = subject.tokens(rows)
    slots = subject.place(spread(subject.lengths(), rows))
    for _ in range(2):  # what is loaded, tuned or allocated once is not the step's
        step.stage(slots, tokens)
        step.body()
    torch.cuda.synchronize()
    say(f"batch {rows}: capture and calls")
    nodes = _captured(step, slots, tokens, report)
    if nodes is None:
        report.findings = merged(report.findings)
        return report
    _describe(nodes, report)
    _record(step, slots, tokens, report)
    say(f"batch {rows}: the step captured at several lengths")
    _baked(step, subject, tokens, report)
    say(f"batch {rows}: replay and eager")
    _bits(step, subject, tokens, report)
    report.findings = merged(report.findings)
    return report


def prove_recorder() -> None:
    """A recorder that sees nothing would certify anything: it must see a kernel and a synchronisation made here."""
    x = torch.zeros(1, device="cuda")
    x.add_(1)
    torch.cuda.synchronize()
    with Watch() as seen:
        x.add_(1)
        torch.cuda.synchronize()
    kinds = {finding.kind for finding in seen.findings}
    if not {"kernel", "sync"} <= kinds:
        raise KernelError(
            "CUPTI is loaded but does not tell of a kernel launch and a synchronisation made as a trial (it told of "
            f"{sorted(kinds) or 'nothing'}), so a clean report would mean nothing here"
        )


def spread(lengths: Sequence[int], rows: int) -> list[int]:
    """`rows` lengths, the given ones in turn."""
    return [lengths[i % len(lengths)] for i in range(rows)]


def groups(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """All lengths in groups of `rows`, the last one filled up from the front."""
    starts = range(0, len(lengths), rows)
    return [[lengths[(start + i) % len(lengths)] for i in range(rows)] for start in starts]


def _captured(step: Step, slots: list[int], tokens: list[int], report: BatchReport) -> list[census.Node] | None:
    """Capture the step as production does and read its graph; None, with findings, where capturing failed."""
    step.stage(slots, tokens)
    torch.cuda.synchronize()
    watch = Watch(ignore=_CAPTURING)
    try:
        with watch:
            step.capture()
    except (RuntimeError, KernelError) as failure:
        error = _root(failure)
        words = str(error).strip().splitlines() or [type(error).__name__]
        report.findings.append(Finding("graph", "capture", f"the step cannot be captured: {words[0]}", _raised(error)))
        torch.cuda.synchronize()
        report.findings += _eager_calls(step, slots, tokens)
        return None
    if step.graph is None:
        raise KernelError("capture() left the step without a graph")
    return census.read(step.graph, watch.log)


def _root(error: BaseException) -> BaseException:
    """The first error of a chain: ending a capture that failed raises another one."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _raised(error: BaseException) -> Where:
    frames = traceback.extract_tb(error.__traceback__)
    return Where(places((frame.filename, frame.lineno or 0, frame.name) for frame in reversed(frames)))


def _eager_calls(step: Step, slots: list[int], tokens: list[int]) -> list[Finding]:
    """What in the body forbids a capture, by running it eagerly: its kernels, and tensors it makes, do not."""
    step.stage(slots, tokens)
    torch.cuda.synchronize()
    with Watch(ignore=_CAPTURING) as seen:
        step.body()
    torch.cuda.synchronize()
    return seen.findings


def _describe(nodes: list[census.Node], report: BatchReport) -> None:
    report.findings += census.findings(nodes)
    report.nodes = dict(sorted(Counter(node.type for node in nodes).items()))
    report.kernels = dict(Counter(node.name for node in nodes if node.type == "kernel").most_common())
    report.lines = dict(Counter(node.where.place for node in nodes if node.where is not None).most_common())
    unknown = sum(node.where is None for node in nodes)
    if unknown:
        report.notes.append(f"CUPTI named no Python line for {unknown} of {len(nodes)} graph nodes")


def _record(step: Step, slots: list[int], tokens: list[int], report: BatchReport) -> None:
    """Runs that follow one another, each until the host has its tokens, must be one graph launch each and nothing else.
    The stage before them may copy from pinned memory and launch kernels, but not wait, allocate, load or copy from
    pageable memory.
    """
    for _ in range(2):  # the first launch uploads the graph
        step.stage(slots, tokens)
        step.run()
        step.wait()
    torch.cuda.synchronize()
    gc.collect()  # so that no tensor of an earlier step dies during a recorded one
    with Watch(ignore=_WORK) as stage:
        step.stage(slots, tokens)
    torch.cuda.synchronize()
    report.stage_calls, seen = stage.calls, [stage]
    for _ in range(_STEPS):
        with Watch() as run:
            step.run()
            step.wait()
        seen.append(run)
        if run.graph_launches != 1:
            what = f"{run.graph_launches} graph launches in one step; a quiet step is one"
            report.findings.append(Finding("calls", "graph launches", what))
    torch.cuda.synchronize()
    calls: Counter[str] = Counter()
    allocator: Counter[str] = Counter()
    for watch in seen:
        report.findings += watch.findings
        report.allowed += [f"{reason} (at {where})" for reason, where in watch.allows]
        allocator.update(watch.allocator)
    for watch in seen[1:]:
        report.graph_launches.append(watch.graph_launches)
        calls.update(watch.calls)
    report.calls, report.allocator = dict(sorted(calls.items())), dict(allocator)


def _baked(step: Step, subject: Subject, tokens: list[int], report: BatchReport) -> None:
    """Capture the body at several lengths into one pool, one capture after the other: it hands each the same
    addresses, as all of them ask for the same memory in the same order.
    """
    longest = subject.lengths()[-1]
    plans = {f"{n} tokens": [n] * step.rows for n in (SHORT, LONG) if n <= longest}
    plans[f"{longest} tokens"] = [longest, *[min(LONG, longest)] * (step.rows - 1)]
    pool = torch.cuda.graph_pool_handle()
    kept: list[torch.cuda.CUDAGraph] = []  # a pool lives as long as a graph of it
    taken: dict[str, list[list[census.Node]]] = {label: [] for label in plans}
    first = next(iter(plans.items()))
    for label, lengths in [*plans.items(), first]:  # the first once more: what differs by then is no matter of length
        slots = subject.place(lengths)
        step.stage(slots, tokens)
        torch.cuda.synchronize()
        graphs = []
        # the first captures ever make the pool grow, so their addresses are like no later one's
        for _ in range(_CAPTURES if kept else _CAPTURES + 2):
            graph, log = _capture_body(step, pool)
            kept.append(graph)
            graphs.append(census.read(graph, log))
        taken[label] += graphs[-_CAPTURES:]
    captures = [scalars.Captures(label, graphs) for label, graphs in taken.items()]
    for other in captures[1:]:
        found, unstable = scalars.findings(captures[0], other, bits.live_memory(apart_from=pool))
        report.findings += found
        report.scalars.append(f"{captures[0].label} and {other.label}: {len(captures[0].graphs[0])} nodes")
        if unstable:
            report.notes.append(
                f"baked scalars, {report.scalars[-1]}: {unstable} argument bytes differ between captures at one length "
                "too, or are addresses of no tensor outside the graphs, and were left out"
            )


def _capture_body(step: Step, pool: Any) -> tuple[torch.cuda.CUDAGraph, CallLog]:
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with Watch(ignore=_CAPTURING) as seen, torch.cuda.graph(graph, pool=pool):
        step.body()
    return graph, seen.log


def _bits(step: Step, subject: Subject, tokens: list[int], report: BatchReport) -> None:
    for lengths in groups(subject.lengths(), step.rows):
        label = "lengths " + (" ".join(map(str, lengths)) if len(lengths) <= 8 else f"{lengths[0]} to {max(lengths)}")
        slots = subject.place(lengths)
        report.findings += bits.compare(step, subject, slots, tokens, label)
        live = max(1, step.rows // 2)
        padded = f"{label}, {live} of {step.rows} rows live"
        report.findings += bits.compare(step, subject, slots[:live], tokens[:live], padded) if live < step.rows else []
        report.findings += bits.poisoned(step, subject, slots[:live], tokens[:live], padded)
        report.compared.append(label)
