"""gather_columns on a CPU: what the ranks give by other means, and what it refuses."""

from dataclasses import replace

import pytest
import torch

from dsv4.errors import KernelError
from dsv4.kernels.gather_columns.cases import echo
from dsv4.kernels.gather_columns.gather_columns import gather_columns, gather_words

CPU = torch.device("cpu")


@pytest.mark.parametrize(("rows", "columns", "size"), [(1, 7, 2), (3, 1024, 4), (0, 5, 2)])
def test_ranks_lie_side_by_side(rows, columns, size):
    x = torch.randn(rows, columns)
    peers = echo(0, size, columns, CPU)
    out = torch.full((rows, size * columns), torch.nan)
    assert gather_columns(x, peers, out=out) is out
    assert torch.equal(out, x.repeat(1, size))


def test_an_inbox_holds_two_turns_of_whole_fours():
    assert gather_words(2, 64640) == 2 * 2 * 128 * 64640 // 2
    assert gather_words(4, 1025) == 2 * 4 * 128 * 1028 // 2


def test_columns_of_another_dtype_are_refused():
    peers = replace(echo(0, 2, 8, CPU), total=lambda x: x.reshape(-1, 3))
    with pytest.raises(KernelError, match="gather_columns: 'x' has dtype"):
        gather_columns(torch.zeros(1, 8, dtype=torch.bfloat16), peers)
