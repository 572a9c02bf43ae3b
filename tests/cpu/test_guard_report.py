"""What the guard says, without a GPU: reports and the exit status, captures by byte, bits, and what is not there."""

import ctypes
import json

import guard_fakes as fakes
import pytest
import torch

from dsv4 import cli
from dsv4.cli import check_decode
from dsv4.engine.guard import census, cupti, driver, scalars, structs
from dsv4.engine.guard.calls import CallLog, Sighting
from dsv4.engine.guard.certificate import groups, spread
from dsv4.engine.guard.findings import BatchReport, Finding, Report, merged
from dsv4.engine.guard.where import Where
from dsv4.errors import KernelError

# ----------------------------------------------------------------------------------------------------------- reports


def test_equal_findings_are_counted():
    a, b = Finding("calls", "sync", "x", Where(("a.py:1 f",))), Finding("calls", "sync", "x", Where(("a.py:2 f",)))
    assert merged([a, b, a, a]) == [Finding("calls", "sync", "x", a.where, 3), b]
    assert merged([a, a])[0].line() == "sync: x (2 times) at a.py:1"


def test_the_exit_status_is_zero_only_when_clean():
    assert Report({}).exit_status == 1, "nothing was looked at"
    assert Report({}, [BatchReport(1)]).exit_status == 0
    found = BatchReport(4, [Finding("calls", "sync", "x")])
    assert Report({}, [BatchReport(1), found]).exit_status == 1
    excused = BatchReport(4, [Finding("calls", "sync", "x", allowed="because")])
    report = Report({"gpu": "g"}, [excused])
    assert report.exit_status == 0
    document = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert document["clean"] and document["batches"][0]["findings"][0]["allowed"] == "because"


def run_cli(arguments, capsys) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    out, err = capsys.readouterr()
    return exit_.value.code, out, err


@pytest.fixture
def pretend_gpu(monkeypatch):
    """A machine whose certificate says what `reports` holds."""
    reports = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check_decode, "open_subject", lambda most_rows, model, tp, **settings: None)
    monkeypatch.setattr(check_decode, "software", lambda: {"gpu": "none"})
    monkeypatch.setattr(check_decode, "certify", lambda subject, rows, say: reports.pop(0))
    return reports


def test_the_command_exits_with_zero_and_writes_its_document(pretend_gpu, capsys, tmp_path):
    pretend_gpu += [BatchReport(1, graph_launches=[1, 1, 1]), BatchReport(4)]
    out = tmp_path / "gpu" / "check.json"
    status, shown, said = run_cli(["check", "decode", "--batch", "1,4", "--json", "--out", str(out)], capsys)
    assert status == 0 and "clean" in said
    document = json.loads(shown)
    assert document == json.loads(out.read_text()) and document["clean"] and document["model"] == "nano"
    assert [part["rows"] for part in document["batches"]] == [1, 4]


def test_the_command_exits_with_one_and_names_the_line(pretend_gpu, capsys):
    where = Where(("dsv4/engine/step.py:88 stage",), "worker")
    pretend_gpu.append(
        BatchReport(1, [Finding("calls", "sync", "cudaStreamSynchronize", where)], [1], {"cudaGraphLaunch": 1})
    )
    status, shown, said = run_cli(["check", "decode", "--batch", "1", "--inventory"], capsys)
    assert status == 1 and "1 findings" in said
    assert "batch 1: found: [calls] sync: cudaStreamSynchronize at dsv4/engine/step.py:88 on thread worker" in shown


def test_the_command_refuses_what_it_cannot_do(capsys):
    status, _, said = run_cli(["check", "decode", "--batch", "1,x"], capsys)
    assert status == 1 and "--batch takes numbers" in said


# ------------------------------------------------------------------------------------------------- what is not there


def test_a_missing_cupti_says_where_it_was_looked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("DSV4_CUPTI", str(tmp_path / "libcupti.so"))
    with pytest.raises(KernelError, match=r"needs CUPTI .* set DSV4_CUPTI .*tmp.*libcupti\.so"):
        cupti.find()
    monkeypatch.delenv("DSV4_CUPTI")
    assert all("libcupti" in path.name for path in cupti.candidates())


def test_a_library_that_is_not_cupti_is_refused():
    with pytest.raises(KernelError, match="cannot serve as CUPTI"):
        cupti.Cupti("libc.so.6")


def test_a_missing_or_old_driver_is_refused():
    with pytest.raises(KernelError, match="needs the CUDA driver"):
        driver.Driver("libno-such-driver.so")
    with pytest.raises(KernelError, match="has no cuDriverGetVersion"):
        driver.Driver("libc.so.6")


# ------------------------------------------------------------------------------------------------------------ graphs


def kernel(name="k", *arguments: bytes, launch=(1, 1, 1, 32, 1, 1, 0), where=None):
    numbered = tuple((f"argument {i}", data) for i, data in enumerate(arguments))
    return census.Node("kernel", name, launch, numbered, where=where)


def i32(value: int) -> bytes:
    return value.to_bytes(4, "little", signed=True)


def diff(first, second):
    return scalars.findings(scalars.Captures("5 tokens", first), scalars.Captures("300 tokens", second))


def test_equal_captures_are_clean():
    graph = [kernel("a", i32(1), b"12345678"), census.Node("memset", parameters=(("value", i32(0)),))]
    assert diff([graph, graph], [graph, graph]) == ([], 0)


def test_a_baked_number_is_named_with_both_values():
    where = Where(("dsv4/kernels/x/x.py:7 x",))
    short, long = [[kernel("dsv4::scale", b"p" * 8, i32(n), where=where)] for n in (5, 300)]
    (finding,), unstable = diff([short, short], [long, long])
    assert unstable == 0 and finding.where == where
    assert finding.what.startswith("dsv4::scale: argument 1 is 5 (as float ")
    assert "at 5 tokens, 300 (as float" in finding.what and finding.what.endswith("at 300 tokens")


def test_a_number_inside_a_struct_is_named_by_its_offset():
    short, long = [[kernel("k", bytes(12) + i32(n) + bytes(4))] for n in (5, 300)]
    (finding,), _ = diff([short, short], [long, long])
    assert "argument 0 + 12 is 5" in finding.what


def test_bytes_that_differ_at_one_length_prove_nothing():
    garbage = [[kernel("k", i32(n) + i32(1))] for n in (1, 2, 3, 4)]
    assert diff(garbage[:2], garbage[2:]) == ([], 1)
    short, long = [kernel("k", i32(9) + i32(5))], [kernel("k", i32(8) + i32(300))]
    (finding,), unstable = diff([short, [kernel("k", i32(7) + i32(5))]], [long, long])
    assert f"argument 0 is {hex(5 << 32 | 9)} at 5 tokens, {hex(300 << 32 | 8)}" in finding.what and unstable == 1


def test_an_address_counts_only_in_memory_that_lives_outside_the_graphs():
    """A pointer to one position of the cache is baked; one into the graphs' own memory or to nothing is not."""
    live = [range(0x7F00_0000_0000, 0x7F00_0000_1000)]

    def found(a: int, b: int, before: bytes = i32(1) + i32(2)) -> int:
        first, second = ([[kernel("k", before + n.to_bytes(8, "little"))]] * 2 for n in (a, b))
        captures = scalars.Captures("5 tokens", first), scalars.Captures("300 tokens", second)
        return len(scalars.findings(*captures, live)[0])

    assert found(0x7F00_0000_0010, 0x7F00_0000_0ABC) == 1
    assert found(0x7F00_0000_0010, 0x7F00_0000_1000) == 0
    assert found(0x7E00_0000_0010, 0x7E00_0000_0ABC) == 0
    assert found(0x7E00_0000_0010, 0x7E00_0000_0ABC, before=i32(1)) == 0  # left on the stack, at any multiple of 4
    assert found(5, 300) == 1


def test_launch_shapes_and_other_kernels_count_too():
    wide = kernel("k", launch=(9, 1, 1, 32, 1, 1, 0))
    (finding,), _ = diff([[kernel("k")]] * 2, [[wide]] * 2)
    assert "launched as grid 1x1x1 block 32x1x1 shared 0 at 5 tokens, grid 9x1x1" in finding.what
    (finding,), _ = diff([[kernel("a"), kernel("b")]] * 2, [[kernel("a"), kernel("c")]] * 2)
    assert "node 1 of 2 is b at 5 tokens, node 1 of 2 is c at 300 tokens" in finding.what
    (finding,), _ = diff([[kernel("a")]] * 2, [[kernel("a"), kernel("b")]] * 2)
    assert "is nothing at 5 tokens, node 1 of 2 is b" in finding.what
    memset = [census.Node("memset", parameters=(("width", i32(n)),)) for n in (5, 300)]
    (finding,), _ = diff([[memset[0]]] * 2, [[memset[1]]] * 2)
    assert finding.what.startswith("memset node: width is 5")


def test_loud_nodes_are_findings():
    where = Where(("a.py:1 f",))
    nodes = [kernel(), census.Node("memcpy", memory=("device", "pinned")), census.Node("event wait")]
    assert census.findings(nodes) == []
    loud = [
        census.Node("host", where=where),
        census.Node("mem alloc"),
        census.Node("memcpy", memory=("device", "pageable")),
        census.Node("type 99"),
        census.Node("conditional"),
    ]
    kinds = [finding.kind for finding in census.findings(loud)]
    assert kinds == ["host function", "alloc", "pageable copy", "graph", "graph"]
    assert census.findings(loud)[0].where == where


def test_nodes_get_lines_by_handle_or_by_order():
    a, b, c = (Where((f"{name}.py:1 f",)) for name in "abc")
    found = [(1, kernel("x")), (2, census.Node("memset")), (3, kernel("y"))]
    log = CallLog({})
    log.captured = [
        Sighting(kind, "call", where, None) for kind, where in (("kernel", a), ("memset", b), ("kernel", c))
    ]
    assert [node.where for node in census.located(found, log)] == [a, b, c]
    log.captured.pop()  # not one call per node: no guess
    assert [node.where for node in census.located(found, log)] == [None, None, None]
    log.nodes = {1: (b, None), 2: (a, "why")}
    assert [(node.where, node.allowed) for node in census.located(found, log)] == [(b, None), (a, "why"), (None, None)]


def test_kernel_names_are_read_as_written():
    assert census.demangled("_ZN4dsv45scaleIfEEvPT_i") == "dsv4::scale<float>"
    assert census.demangled("dsv4_router") == "dsv4_router"
    assert census.shortened("void k<(int)4, f(int)>(float*, void (*)(int))") == "k<(int)4, f(int)>"


def test_packed_kernel_arguments_are_read():
    data = ctypes.create_string_buffer(b"abcdefgh", 8)
    size = ctypes.c_size_t(8)
    extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(data), 2, ctypes.addressof(size), 0)
    node = structs.KernelNode(extra=ctypes.cast(extra, ctypes.POINTER(ctypes.c_void_p)))
    assert census._packed(node) == b"abcdefgh"
    assert census._packed(structs.KernelNode()) is None


# -------------------------------------------------------------------------------------------------------------- bits


def test_lengths_are_dealt_to_rows():
    assert spread([1, 2, 3], 5) == [1, 2, 3, 1, 2]
    assert groups([1, 2, 3], 2) == [[1, 2], [3, 1]]
    assert groups([1, 2], 1) == [[1], [2]]


def test_a_faithful_step_is_clean():
    assert fakes.bit_findings(fakes.Notebook()) == []


def test_a_replay_that_differs_is_found_with_its_place():
    found = fakes.bit_findings(fakes.Notebook(fakes.StaleReplay))
    assert found and all(finding.kind == "bits" for finding in found)
    assert "sums: " in found[0].what and "first at [" in found[0].what


def test_nan_in_a_live_row_is_found_although_it_equals_itself():
    assert "not finite" in {finding.kind for finding in fakes.bit_findings(fakes.Notebook(fakes.MakesNaN))}


def test_reading_another_sequence_is_found():
    found = fakes.bit_findings(fakes.Notebook(fakes.ReadsAll))
    assert any("clean" in finding.what and "poisoned" in finding.what for finding in found)


def test_a_padding_row_that_writes_is_found():
    found = fakes.bit_findings(fakes.Notebook(fakes.PaddingWrites))
    assert any(finding.kind == "poison" and "no sequence's next" in finding.what for finding in found)
