"""swizzle and swizzle_grouped against the formula, byte by byte."""

import torch

from dsv4.kernels.swizzle.swizzle import swizzle, swizzle_grouped


def by_formula(scale):
    rows, columns = scale.shape
    across = -(-columns // 4)
    out = torch.zeros(-(-rows // 128) * across * 512, dtype=torch.uint8)
    for i in range(rows):
        for j in range(columns):
            out[((i // 128) * across + j // 4) * 512 + (i % 32) * 16 + (i % 128) // 32 * 4 + j % 4] = scale[i, j]
    return out


def scales(rows, columns):
    return torch.randint(1, 127, (rows, columns), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def test_every_byte_is_where_the_formula_says():
    for rows, columns in ((1, 1), (130, 6), (257, 4)):
        assert torch.equal(swizzle(scales(rows, columns)), by_formula(scales(rows, columns)))


def test_a_view_of_a_larger_buffer_is_that_view():
    large = scales(200, 12)
    assert torch.equal(swizzle(large[:70, :5]), by_formula(large[:70, :5].clone()))


def test_groups_follow_one_another_and_zeros_follow_them():
    scale, rows = scales(134, 5), torch.tensor([3, 0, 130, 1])
    parts = [by_formula(part) for part in scale.split(rows.tolist())]
    got = swizzle_grouped(scale, rows)
    used = sum(map(len, parts))
    assert torch.equal(got[:used], torch.cat(parts))
    assert not got[used:].any()
    assert len(got) == swizzle_grouped(scale, torch.tensor([134, 0, 0, 0])).numel()
