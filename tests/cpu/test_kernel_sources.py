"""Every kernel compiles for every target; the checker finds what is wrong with an op; the commands speak of both."""

import ctypes
import dataclasses

import pytest
import torch
from typer.testing import CliRunner

from dsv4.cli import app
from dsv4.errors import KernelError
from dsv4.kernels import cases, check, compiler, launch
from dsv4.kernels.loader import bind
from dsv4.kernels.q_norm_rope.q_norm_rope_ref import q_norm_rope_ref
from dsv4.kernels.rms_norm.rms_norm_ref import rms_norm_ref
from dsv4.kernels.router.router_ref import router_ref
from dsv4.kernels.swiglu.swiglu_ref import swiglu_ref

CPU = torch.device("cpu")


@pytest.mark.parametrize("op", compiler.ops_with_kernels())
def test_compiles_for_every_target_and_exports_its_launcher(op, tmp_path):
    try:
        nvcc = compiler.find_nvcc()
    except KernelError as error:
        assert "no CUDA compiler" in str(error) and "install the CUDA toolkit" in str(error)
        return
    library = tmp_path / "kernel.so"
    source = compiler.source_of(op)
    log = compiler.run_compiler(op, compiler.compile_command(nvcc, source, library, compiler.ARCHS, shared=True))
    assert "warning" not in log
    launcher, error_text = bind(ctypes.CDLL(str(library)), op, [])
    assert launcher and error_text(9) == b"invalid configuration argument"
    assert all(arch.encode() in library.read_bytes() for arch in compiler.ARCHS)


@pytest.mark.parametrize("op", compiler.ops_with_kernels())
def test_what_a_source_defines_is_its_own(op):
    """A pack links all ops: two kernels or structs of one name would silently become one."""
    assert "\nnamespace {\n" in compiler.source_of(op).read_text()


def test_every_source_has_cases():
    assert set(compiler.ops_with_kernels()) <= set(cases.ops_with_cases())


@pytest.mark.parametrize("op", cases.ops_with_cases())
def test_a_twin_agrees_with_itself(op):
    """On a CPU tensor the op is its twin: the checker itself must find nothing, empty inputs included."""
    rows = [check.check_case(case, timed=False) for case in cases.cases(CPU, [op], quick=True)]
    assert rows and all(row.ok and row.max_error == 0 and row.equal == 1 for row in rows)


def faulty(op, wrong):
    """Rows of the checker with `wrong` in the kernel's place."""
    made = cases.cases(CPU, [op], quick=True)
    return [check.check_case(dataclasses.replace(case, run=wrong), timed=False) for case in made]


def test_a_small_error_is_found():
    rows = faulty("swiglu", lambda g, u, limit, out: out.copy_(swiglu_ref(g, u, limit) * (1 + 1e-5)))
    exact = [row for row in rows if row.dtype == "f32" and "[0," not in row.case]  # BF16's rounding is larger
    assert exact and all("exceeds the bound" in row.finding for row in exact)


def test_an_element_left_unwritten_is_found():
    def lazy(x, weight, eps, out):
        out[..., :-1] = rms_norm_ref(x, weight, eps)[..., :-1]

    rows = faulty("rms_norm", lazy)
    assert all("exceeds the bound" in row.finding for row in rows if "[0," not in row.case)


def test_writing_past_the_end_and_into_an_input_is_found():
    def wild(x, weight, eps, out):
        out.copy_(rms_norm_ref(x, weight, eps))
        out.as_strided((1,), (1,), out.storage_offset() + out.numel()).zero_()
        weight.zero_()

    for row in faulty("rms_norm", wild):
        assert "output 0 was written past its end" in row.finding
        assert "an input was changed" in row.finding


def test_the_wrong_expert_among_equals_is_found():
    def upper(logits, bias, table, tokens, *, topk, route_scale, out):
        ids, weights = router_ref(logits.flip(1), None, table, tokens, topk=topk, route_scale=route_scale)
        out[0].copy_(logits.shape[1] - 1 - ids)
        out[1].copy_(weights)

    rows = faulty("router", upper)
    assert all(not row.ok for row in rows if "ties" in row.case and "[0," not in row.case)


def test_a_rounding_left_out_is_found_in_the_exact_case():
    def smooth(q, cis, eps, out):
        out.copy_(q_norm_rope_ref(q.float(), cis, eps))

    rows = faulty("q_norm_rope", smooth)
    assert [row.ok for row in rows if row.case == "exact sums"] == [False]


def test_a_dtype_that_a_kernel_does_not_take_is_refused_with_the_way_out():
    launch.bf16_only("moe", "x", torch.zeros(1, dtype=torch.bfloat16))
    with pytest.raises(KernelError, match=r"moe: 'x' is torch\.float32; .* twin: set DSV4_REF=moe, or DSV4_REF=all"):
        launch.bf16_only("moe", "x", torch.zeros(1))


def test_checking_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KernelError, match="needs a CUDA GPU"):
        list(check.check_kernels())


def test_commands(monkeypatch, tmp_path):
    monkeypatch.setenv("DSV4_KERNEL_PACK", str(tmp_path))
    run = lambda *args: CliRunner().invoke(app, args)  # noqa: E731
    listed = run("kernels", "list")
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == compiler.ops_with_kernels()
    assert "there is no pack" in listed.stdout
    shown = run("kernels", "show", "mhc_pre").stdout
    assert compiler.source_hash("mhc_pre") in shown and "dsv4/reduce.cuh" in shown and "dsv4_mhc_pre" in shown
    assert isinstance(run("kernels", "show", "nothing").exception, KernelError)


def test_a_failed_check_exits_with_1(monkeypatch):
    good = check.Row("rope", "[1, 64, 512]", "bf16", 0.0, 0.0, 0.0, 1.0, 1.5, 90.0, None)
    bad = dataclasses.replace(good, max_error=float("inf"), finding="error inf exceeds the bound 0")
    monkeypatch.setattr(check, "check_kernels", lambda ops, quick: iter([good, bad]))
    result = CliRunner().invoke(app, ["check", "kernels"])
    assert result.exit_code == 1
    assert "exceeds the bound" in result.stdout and "1 of 2 cases agree" in result.stderr
    monkeypatch.setattr(check, "check_kernels", lambda ops, quick: iter([good]))
    assert CliRunner().invoke(app, ["check", "kernels"]).exit_code == 0
