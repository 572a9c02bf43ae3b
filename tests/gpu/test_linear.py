"""On a GPU, a row of `linear` has the same bits whatever rows are beside it and however many, up to 192."""

import pytest
import torch

from dsv4.kernels.case import Maker
from dsv4.kernels.linear.cases import activations, weight
from dsv4.kernels.linear.linear import linear
from dsv4.kernels.linear.operand import linear_operand

CUDA = torch.device("cuda")


@pytest.mark.parametrize("format", ["nvfp4", "fp8", "bf16"])
@pytest.mark.parametrize(("n", "k"), [(32768, 1024), (4096, 8192), (1536, 4096), (1001, 1088)])
def test_the_bits_of_a_row_do_not_depend_on_the_rows_beside_it(format, n, k):
    make = Maker(CUDA)
    operand = linear_operand(weight(make, format, n, k), act="bf16")
    x = activations(make, 192, k)
    (together,) = linear(x, operand)
    for rows in (1, 4, 8, 9, 16, 17, 31, 33, 64, 65, 128):
        for first in (0, 192 - rows):
            (alone,) = linear(x[first : first + rows], operand)
            assert torch.equal(alone, together[first : first + rows]), rows
