"""Kernels on the GPU at hand: against their twins, across batches, inside a graph, and what they refuse."""

import pytest
import torch

from dsv4.errors import KernelError
from dsv4.kernels.cases import ops_with_cases
from dsv4.kernels.check import check_kernels
from dsv4.kernels.loader import Kernel, arch_of
from dsv4.kernels.mhc_pre.mhc_pre import mhc_pre
from dsv4.kernels.rms_norm.rms_norm import rms_norm
from dsv4.kernels.rope.rope import rope
from dsv4.kernels.swiglu.swiglu import swiglu

CUDA = torch.device("cuda")


def site(tokens, width=4096):
    torch.manual_seed(1)
    h = torch.randn(tokens, 4, width, device=CUDA).bfloat16()
    fn = torch.randn(24, 4 * width, device=CUDA) * (4 * width) ** -0.5
    return h, fn, torch.randn(24, device=CUDA), torch.ones(24, device=CUDA)


@pytest.mark.parametrize("op", ops_with_cases())
def test_every_case_agrees_with_the_twin(op):
    rows = list(check_kernels([op], quick=True))
    assert rows and not [row for row in rows if not row.ok]


def test_the_bits_of_a_row_do_not_depend_on_the_batch():
    eps = {"sinkhorn_iters": 20, "hc_eps": 1e-6, "norm_eps": 1e-6}
    h, *weights = site(67)
    together = mhc_pre(h, *weights, **eps)
    for t in (0, 3, 66):
        alone = mhc_pre(h[t : t + 1], *weights, **eps)
        assert all(torch.equal(a[0], b[t]) for a, b in zip(alone, together, strict=True))


def test_with_out_nothing_is_allocated():
    x, w, out = torch.randn(4, 4096, device=CUDA), torch.ones(4096, device=CUDA), torch.empty(4, 4096, device=CUDA)
    rms_norm(x, w, 1e-6, out=out)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    assert rms_norm(x, w, 1e-6, out=out) is out
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_nan_stays_visible():
    bad = torch.tensor([[float("nan"), 1.0]], device=CUDA)
    fine = torch.ones(1, 2, device=CUDA)
    assert swiglu(bad, fine, 10.0)[0].isnan().tolist() == [True, False]
    assert swiglu(fine, bad, 10.0)[0].isnan().tolist() == [True, False]
    assert rms_norm(bad, torch.ones(2, device=CUDA), 1e-6).isnan().all()


def test_a_failed_launch_names_op_target_and_error():
    kernel = Kernel("rms_norm", "pppqqifi")
    with pytest.raises(KernelError, match=rf"op 'rms_norm' failed on {arch_of(CUDA)}: invalid .* \(cudaError \d+\)"):
        kernel(CUDA, None, None, None, 1 << 32, 8, 8, 1e-6, 1)  # a grid of 2^32 rows
    x = torch.randn(1, 8, device=CUDA)
    assert rms_norm(x, torch.ones(8, device=CUDA), 1e-6).isfinite().all()  # the context survives


def test_views_that_a_kernel_would_misread_are_refused():
    w = torch.ones(8, device=CUDA)
    with pytest.raises(KernelError, match="rms_norm: 'x' has strides"):
        rms_norm(torch.randn(1, 8, device=CUDA).expand(3, 8), w, 1e-6)
    with pytest.raises(KernelError, match="rms_norm: 'x' has strides"):
        rms_norm(torch.randn(8, 3, device=CUDA).T, w, 1e-6)
    with pytest.raises(KernelError, match="conjugates resolved"):
        rope(torch.randn(1, 8, device=CUDA), torch.ones(1, 2, dtype=torch.complex64, device=CUDA).conj())
    with pytest.raises(KernelError, match="'out' is"):
        rms_norm(torch.randn(1, 8, device=CUDA), w, 1e-6, out=torch.empty(2, 8, device=CUDA))


def test_streams_other_than_four_are_refused():
    h = torch.randn(1, 2, 8, device=CUDA)
    fn, row = torch.randn(8, 16, device=CUDA), torch.randn(8, device=CUDA)
    with pytest.raises(KernelError, match="written for M = 4"):
        mhc_pre(h, fn, row, row, sinkhorn_iters=20, hc_eps=1e-6, norm_eps=1e-6)
