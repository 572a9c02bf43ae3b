"""The certificate on a GPU: a quiet step is clean, each planted fault is found with its line, the command says 1."""

import guard_steps as steps
import pytest
import torch

from dsv4 import cli
from dsv4.cli import check_decode
from dsv4.engine.guard.certificate import certify, prove_recorder
from dsv4.engine.guard.watch import Watch

ROWS = 4


def report_of(make, rows=ROWS):
    return certify(steps.Notebook(make), rows)


def said(report) -> str:
    return "\n".join(finding.line() for finding in report.findings)


def test_the_recorder_hears_kernels_and_waits():
    prove_recorder()


@pytest.mark.parametrize("rows", [1, ROWS])
def test_a_quiet_step_is_clean(rows):
    report = report_of(steps.QuietStep, rows)
    assert not report.findings, said(report)
    assert report.graph_launches == [1, 1, 1]
    assert report.nodes["kernel"] >= 5 and sum(report.kernels.values()) == report.nodes["kernel"]
    assert set(report.nodes) <= {"kernel", "memset", "memcpy"}
    assert len(report.scalars) == 2 and report.compared


def test_graph_nodes_are_laid_to_their_lines():
    report = report_of(steps.QuietStep)
    assert report.lines and all(place.startswith("tests/gpu/guard_steps.py:") for place in report.lines), report.lines


# Fault -> kinds of which each must be found at its line.
AT_A_LINE = {
    steps.ItemAtReplay: {"sync"},
    steps.ItemAtStage: {"sync"},
    steps.ItemInBody: {"capture", "sync"},
    steps.ZerosAtReplay: {"alloc", "tensor"},
    steps.CachedZerosAtReplay: {"tensor"},
    steps.PageableIn: {"pageable copy"},
    steps.PageableOut: {"pageable copy"},
    steps.LibraryMalloc: {"alloc"},
    steps.BakedLength: {"baked"},
    steps.LengthInShape: {"baked"},
    steps.EagerKernel: {"kernel"},
    steps.CompilesAtReplay: {"process"},
    steps.HostNode: {"host function"},
    steps.AllocationNode: {"alloc"},
}


@pytest.mark.parametrize("fault", AT_A_LINE, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found_with_its_line(fault):
    report = report_of(fault)
    line = steps.line_of(fault)
    found = {finding.kind for finding in report.refused if finding.where is not None and finding.where.place == line}
    assert AT_A_LINE[fault] <= found, f"wanted {AT_A_LINE[fault]} at {line}; found:\n{said(report)}"


def test_a_librarys_thread_is_named():
    (finding,) = [f for f in report_of(steps.LibraryMalloc).refused if f.kind == "alloc"]
    assert finding.where.thread == "library" and finding.what == "cudaMalloc" and finding.count == 3


def test_a_thread_without_python_is_found():
    found = [f for f in report_of(steps.NativeThread).refused if f.kind == "sync"]
    assert any("not started by Python" in f.where.thread and f.where.place == "no Python frame" for f in found), found


def test_a_pageable_copy_in_the_body_is_found():
    """Whether CUDA captures such a copy or refuses to."""
    report = report_of(steps.PageableInBody)
    assert {"pageable copy", "capture"} & {finding.kind for finding in report.refused}, said(report)


def test_two_graph_launches_are_one_too_many():
    report = report_of(steps.TwoGraphs)
    assert report.graph_launches == [2, 2, 2]
    assert "2 graph launches in one step" in said(report)


def test_a_baked_number_is_shown_with_both_values():
    found = [finding.what for finding in report_of(steps.BakedLength, rows=1).refused if finding.kind == "baked"]
    assert any(" at 5 tokens, " in what and " at 300 tokens" in what for what in found), found


@pytest.mark.parametrize("fault", [steps.StaleReplay, steps.BakedLength], ids=lambda fault: fault.__name__)
def test_a_replay_that_differs_from_eager_is_found(fault):
    report = report_of(fault)
    assert any(finding.kind == "bits" and "replay" in finding.what for finding in report.refused), said(report)


def test_reading_other_sequences_memory_is_found():
    report = report_of(steps.ReadsOthers)
    assert any("poisoned" in finding.what for finding in report.refused), said(report)


def test_a_padding_row_that_writes_is_found():
    report = report_of(steps.PaddingWrites)
    assert any(finding.kind == "poison" for finding in report.refused), said(report)


def test_what_is_allowed_is_listed_and_clean():
    report = report_of(steps.Allowed)
    assert not report.refused, said(report)
    assert {finding.allowed for finding in report.findings} == {"the test says so"}
    assert len(report.allowed) == 3 and "the test says so (at tests/gpu/guard_steps.py:" in report.allowed[0]


def test_a_watch_leaves_nothing_behind():
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        with Watch() as seen:
            pass
        assert not seen.findings and not seen.graph_launches
    assert torch.cuda.memory_allocated() == before


def status_of(make, monkeypatch) -> int:
    monkeypatch.setattr(check_decode, "open_subject", lambda *model, **settings: steps.Notebook(make))
    with pytest.raises(SystemExit) as exit_:
        cli.main(["check", "decode", "--batch", "2"])
    return exit_.value.code


def test_the_command_exits_with_zero_for_a_quiet_step(monkeypatch, capsys):
    assert status_of(steps.QuietStep, monkeypatch) == 0
    assert "clean" in capsys.readouterr().err


@pytest.mark.parametrize("fault", AT_A_LINE, ids=lambda fault: fault.__name__)
def test_the_command_exits_with_one_and_names_the_line(fault, monkeypatch, capsys):
    assert status_of(fault, monkeypatch) == 1
    assert steps.line_of(fault) in capsys.readouterr().out


@pytest.mark.parametrize("act", ["bf16", "nvfp4"])
@pytest.mark.parametrize("rows", [1, 4])
def test_the_step_of_the_embedded_model_is_quiet(rows, act):
    report = certify(check_decode.open_subject(rows, "nano", act=act), rows)
    assert not report.refused, said(report)
