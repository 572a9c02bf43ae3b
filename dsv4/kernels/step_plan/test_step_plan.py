"""step_plan against arithmetic on Python integers; against the host's own plan: tests/cpu/test_static_plan.py."""

import math

import torch

from dsv4.kernels.step_plan.rows import Kind, StepRows
from dsv4.kernels.step_plan.step_plan import step_plan

WINDOW, CSA, HCA = 8, Kind(4, True, 0, 3, 0), Kind(16, False, 1, 2, 100)
SLOTS, POSITIONS = [2, -1, 0, 1, 3], [515, 99, 3, 15, 0]
FREQS = torch.tensor([[1.0, 0.1], [0.5, 0.25]])


def tables() -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(3)
    return [torch.randperm(4 * width, generator=gen).view(4, width) for width in (5, 2)]


def plan() -> StepRows:
    rows = StepRows.empty(len(SLOTS), WINDOW, FREQS, (CSA, HCA))
    for tensor in rows.tensors():
        tensor.fill_(77)
    state = torch.tensor(SLOTS), torch.tensor(POSITIONS), FREQS
    step_plan(*state, tables(), (CSA, HCA), WINDOW, out=rows.tensors())
    return rows


def test_rows_are_what_the_words_say():
    rows = plan()
    for b, (slot, position) in enumerate(zip(SLOTS, POSITIONS, strict=True)):
        if slot < 0:
            continue
        seen = [slot * WINDOW + p % WINDOW for p in range(max(0, position - WINDOW + 1), position + 1)]
        assert rows.window_rows[b].tolist() == seen + [-1] * (WINDOW - len(seen))
        assert rows.window_to[b] == slot * WINDOW + position % WINDOW and rows.sequence[b] == b
        for kind, made, table in zip((CSA, HCA), rows.kinds, tables(), strict=True):
            n, visible, held = kind.items, (position + 1) // kind.ratio, table[slot].tolist()
            assert made.phase[b] == position % kind.ratio and made.visible[b] == visible
            assert made.write_to[b] == slot * n + position % n
            used = -(-visible // 64)
            assert made.pages[b].tolist() == held[:used] + [-1] * (kind.pages - used)
            row = [held[e // 64] * 64 + e % 64 for e in range(visible)]
            assert made.all_rows[b].tolist() == (row + [-1] * kind.width)[: kind.width]
            if (position + 1) % kind.ratio:
                assert made.entry_to[b] == -1
                continue
            tokens = range(position - n + 1, position + 1)
            assert made.items[b].tolist() == [slot * n + t % n if t >= 0 else -1 for t in tokens]
            assert made.entry_to[b] == row[-1] and made.entry_positions[b] == position + 1 - kind.ratio


def test_rotations_are_of_the_float32_product():
    rows = plan()
    for b, (slot, position) in enumerate(zip(SLOTS, POSITIONS, strict=True)):
        for place in range(2):
            for i in range(2):
                angle = (position if slot >= 0 else 0) * float(FREQS[place, i])
                angle = float(torch.tensor(angle, dtype=torch.float32))
                turn = [math.cos(angle), math.sin(angle)]
                assert (rows.token_cis[place, b, i] - torch.tensor(turn)).abs().max() < 2e-7
                assert (rows.back_cis[place, b, i] - torch.tensor([turn[0], -turn[1]])).abs().max() < 2e-7
    assert (rows.kinds[1].cis[0, 1] - torch.tensor([1.0, 0.0])).abs().max() == 0  # 515 completes no entry of 16
    angle = float(torch.tensor(512 * 0.1, dtype=torch.float32))
    assert (rows.kinds[0].cis[0, 1] - torch.tensor([math.cos(angle), math.sin(angle)])).abs().max() < 2e-6


def test_a_padding_row_is_inert():
    rows = plan()
    nothing = [rows.window_rows, rows.window_to, rows.sequence]
    for made in rows.kinds:
        nothing += [made.write_to, made.entry_to, made.items, made.pages, made.all_rows]
        assert made.visible[1] == 0 and made.phase[1] == 0
    assert all((tensor[1] == -1).all() for tensor in nothing)
    assert (rows.token_cis[:, 1] == torch.tensor([1.0, 0.0])).all()
