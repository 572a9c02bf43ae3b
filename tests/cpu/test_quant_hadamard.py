"""The Walsh-Hadamard transform against the explicit Sylvester matrix in float64."""

import pytest
import torch

from dsv4.errors import KernelError
from dsv4.quant.hadamard import hadamard


def sylvester(n: int) -> torch.Tensor:
    """H_1 = [1], H_2n = [[H, H], [H, -H]]; float64, not normalised."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@pytest.mark.parametrize("n", [1, 2, 4, 32, 128, 512])
def test_equals_the_sylvester_matrix(n: int) -> None:
    x = torch.randn(3, 5, n)
    expected = x.double() @ sylvester(n) * n**-0.5
    # log2(n) float32 additions of terms no larger than the row's norm, then one multiplication
    bound = (n.bit_length() + 1) * 2.0**-24 * x.double().norm(dim=-1, keepdim=True)
    assert ((hadamard(x).double() - expected).abs() <= bound).all()


def test_bfloat16_rounds_once() -> None:
    """Integers stay exact in the float32 butterflies, so only the factor and the last rounding are left."""
    x = torch.randint(-128, 129, (7, 64), dtype=torch.float32)
    expected = ((x.double() @ sylvester(64)) / 8).to(torch.bfloat16)
    result = hadamard(x.to(torch.bfloat16))
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, expected)


def test_is_its_own_inverse() -> None:
    x = torch.randn(4, 128)
    assert torch.allclose(hadamard(hadamard(x)), x, atol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours_or_strides() -> None:
    x = torch.randn(33, 4, 128).to(torch.bfloat16)
    together = hadamard(x)
    assert all(torch.equal(hadamard(x[i : i + 1]), together[i : i + 1]) for i in range(33))
    assert torch.equal(hadamard(x.transpose(0, 1)), together.transpose(0, 1))


def test_no_rows() -> None:
    assert hadamard(torch.empty(0, 64, 128)).shape == (0, 64, 128)


@pytest.mark.parametrize("n", [0, 3, 96])
def test_other_lengths_are_refused(n: int) -> None:
    with pytest.raises(KernelError, match=f"hadamard over {n} entries"):
        hadamard(torch.zeros(2, n))
