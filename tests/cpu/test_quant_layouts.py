"""The 32_4_4 scale layout against its byte formula, and the per-group variant against one matrix at a time."""

import pytest
import torch

from dsv4.errors import KernelError
from dsv4.quant.layouts import swizzle_32_4_4, swizzle_grouped, swizzled_size, unswizzle_32_4_4, unswizzle_grouped

# The last two: a Flash expert's w1 (2048 x 4096/16) and wq_b's rows at a ragged width.
SHAPES = [(128, 4), (256, 8), (200, 7), (300, 13), (1, 1), (2048, 256), (129, 5)]


def by_formula(scale: torch.Tensor) -> torch.Tensor:
    """Every entry (i, j) written at its offset into zeros."""
    rows, columns = scale.shape
    tiles = -(-columns // 4)
    i, j = torch.arange(rows)[:, None], torch.arange(columns)[None]
    offset = ((i // 128) * tiles + j // 4) * 512 + (i % 32) * 16 + ((i % 128) // 32) * 4 + j % 4
    flat = torch.zeros(-(-rows // 128) * 128 * tiles * 4, dtype=torch.uint8)
    flat[offset.flatten()] = scale.flatten()
    return flat


def by_permutation(scale: torch.Tensor) -> torch.Tensor:
    """The reshape form: pad, view (R/128, 4, 32, C/4, 4), permute (0, 3, 2, 1, 4)."""
    rows, columns = scale.shape
    padded = torch.zeros(-(-rows // 128) * 128, -(-columns // 4) * 4, dtype=torch.uint8)
    padded[:rows, :columns] = scale
    return padded.view(len(padded) // 128, 4, 32, -1, 4).permute(0, 3, 2, 1, 4).flatten()


def random_scales(*shape: int) -> torch.Tensor:
    return torch.randint(1, 255, shape, dtype=torch.uint8)  # no zero: padding can be told apart


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_swizzle_equals_the_formula_and_the_permutation(rows: int, columns: int) -> None:
    scale = random_scales(rows, columns)
    flat = swizzle_32_4_4(scale)
    assert flat.is_contiguous()
    assert flat.numel() == swizzled_size(rows, columns)
    assert torch.equal(flat, by_formula(scale))
    assert torch.equal(flat, by_permutation(scale))
    assert torch.equal(unswizzle_32_4_4(flat, rows, columns), scale)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint8])
def test_dtype_and_leading_dimensions_are_kept(dtype: torch.dtype) -> None:
    scale = random_scales(3, 2, 200, 7).view(dtype)
    flat = swizzle_32_4_4(scale)
    assert (flat.dtype, flat.shape) == (dtype, (3, 2, swizzled_size(200, 7)))
    for e in range(3):
        assert torch.equal(flat[e, 1].view(torch.uint8), by_formula(scale[e, 1].view(torch.uint8)))
    back = unswizzle_32_4_4(flat, 200, 7)
    assert back.dtype == dtype
    assert torch.equal(back.view(torch.uint8), scale.view(torch.uint8))


def test_strided_scales_are_read_right() -> None:
    scale = random_scales(7, 140).t()
    assert torch.equal(swizzle_32_4_4(scale), by_formula(scale))


def test_no_rows_take_no_bytes() -> None:
    assert swizzle_32_4_4(random_scales(0, 4)).shape == (0,)
    assert unswizzle_32_4_4(random_scales(0), 0, 4).shape == (0, 4)
    assert swizzled_size(0, 4) == 0


def test_groups_are_padded_one_by_one() -> None:
    group_rows = [5, 0, 130, 128, 1]
    scale = random_scales(sum(group_rows), 6)
    flat = swizzle_grouped(scale.view(torch.float8_e4m3fn), group_rows)
    assert flat.dtype == torch.float8_e4m3fn
    parts = scale.split(group_rows)
    assert torch.equal(flat.view(torch.uint8), torch.cat([by_formula(part) for part in parts if len(part)]))
    assert flat.numel() == sum(swizzled_size(rows, 6) for rows in group_rows)
    assert torch.equal(unswizzle_grouped(flat, group_rows, 6).view(torch.uint8), scale)


def test_wrong_sizes_are_refused_with_both_numbers() -> None:
    with pytest.raises(KernelError, match="hold 512 bytes; expected 1024 for 129 x 4"):
        unswizzle_32_4_4(random_scales(512), 129, 4)
    with pytest.raises(KernelError, match="add up to 5; expected 6"):
        swizzle_grouped(random_scales(6, 4), [2, 3])
    with pytest.raises(KernelError, match="add up to 0; expected 512"):
        unswizzle_grouped(random_scales(512), [], 4)
    with pytest.raises(KernelError, match=r"scales are torch\.float32"):
        swizzle_32_4_4(torch.zeros(4, 4))
