"""embed: rows of the table, zeros for padding, an error for what the vocabulary does not hold."""

import pytest
import torch

from dsv4.kernels.embed.embed import embed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_stream_is_the_tokens_row(dtype):
    table = torch.arange(12.0).view(4, 3).to(dtype)
    h = embed(torch.tensor([3, 0, 3]), table, 2)
    assert h.dtype == dtype
    assert h.tolist() == [[[9, 10, 11]] * 2, [[0, 1, 2]] * 2, [[9, 10, 11]] * 2]


def test_padding_is_zero():
    h = embed(torch.tensor([-1, 1]), torch.ones(4, 3), 4)
    assert h[0].eq(0).all() and h[1].eq(1).all()


def test_the_result_is_its_own_memory():
    table = torch.ones(4, 3)
    embed(torch.tensor([1]), table, 4).zero_()
    assert table.eq(1).all()


def test_an_id_outside_the_vocabulary_is_an_error_on_a_cpu():
    with pytest.raises(IndexError):
        embed(torch.tensor([4]), torch.ones(4, 3), 4)


def test_no_tokens_give_no_rows():
    assert embed(torch.zeros(0, dtype=torch.int64), torch.ones(4, 3), 4).shape == (0, 4, 3)
