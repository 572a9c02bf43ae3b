"""What the certificate says: findings, each with the line that caused it, and the report that holds them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dsv4.engine.guard.where import Where


@dataclass(frozen=True)
class Finding:
    """One thing a quiet step does not do. `allowed` is the reason given to `allow`, None where nobody allowed it."""

    check: str  # "calls", "graph", "scalars" or "bits"
    kind: str  # "sync", "alloc", "host function", ...
    what: str  # the call or node, and its numbers
    where: Where | None = None
    count: int = 1
    allowed: str | None = None

    def line(self) -> str:
        """`kind: what at file:line (thread)`, on one line."""
        times = f" ({self.count} times)" if self.count > 1 else ""
        place = f" at {self.where}" if self.where is not None else ""
        return f"{self.kind}: {self.what}{times}{place}"

    def as_json(self) -> dict[str, Any]:
        where = self.where.as_json() if self.where is not None else None
        return {**{key: value for key, value in asdict(self).items() if key != "where"}, "where": where}


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """Equal findings as one, counted, in order of first appearance."""
    counts: dict[Finding, int] = {}
    for finding in findings:
        single = replace(finding, count=1)
        counts[single] = counts.get(single, 0) + finding.count
    return [replace(finding, count=count) for finding, count in counts.items()]


@dataclass
class BatchReport:
    """The certificate of one batch bucket of `rows` rows. What was looked at stands beside what was found."""

    rows: int
    findings: list[Finding] = field(default_factory=list)
    graph_launches: list[int] = field(default_factory=list)  # per recorded step
    calls: dict[str, int] = field(default_factory=dict)  # API calls of the recorded steps together, outermost ones
    stage_calls: dict[str, int] = field(default_factory=dict)  # of the stage before them
    allocator: dict[str, int] = field(default_factory=dict)  # deltas of torch's counters over both
    nodes: dict[str, int] = field(default_factory=dict)  # graph nodes by type
    kernels: dict[str, int] = field(default_factory=dict)  # kernel nodes by name
    lines: dict[str, int] = field(default_factory=dict)  # graph nodes by the Python line that made them
    compared: list[str] = field(default_factory=list)  # cases in which replay was compared with eager
    scalars: list[str] = field(default_factory=list)  # what the baked-scalar test compared
    allowed: list[str] = field(default_factory=list)  # uses of `allow` in recorded steps
    notes: list[str] = field(default_factory=list)

    @property
    def refused(self) -> list[Finding]:
        """Findings that nobody allowed."""
        return [finding for finding in self.findings if finding.allowed is None]

    def as_json(self) -> dict[str, Any]:
        findings = [finding.as_json() for finding in self.findings]
        document = {key: value for key, value in vars(self).items() if key != "findings"}
        return {**document, "clean": not self.refused, "findings": findings}


@dataclass
class Report:
    """The whole certificate: `about` says of what (model, settings, GPU, software), one part per batch bucket."""

    about: dict[str, Any]
    batches: list[BatchReport] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Something was looked at, and nothing was found that is not allowed."""
        return bool(self.batches) and not any(batch.refused for batch in self.batches)

    @property
    def exit_status(self) -> int:
        return 0 if self.clean else 1

    def as_json(self) -> dict[str, Any]:
        return {**self.about, "clean": self.clean, "batches": [batch.as_json() for batch in self.batches]}
