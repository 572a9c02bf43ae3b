"""advance against a loop over rows."""

import torch

from dsv4.kernels.advance.advance import advance


def state(rows, vocab=9, length=3, columns=6):
    g = torch.Generator().manual_seed(rows)
    draw = lambda *shape: torch.randint(0, 100, shape, generator=g)  # noqa: E731
    ring = torch.full((length, columns), -7)
    return [draw(rows), draw(rows), draw(rows), draw(rows, vocab).int(), ring, torch.tensor([4])]


def test_every_row_moves_on_and_idle_rows_stay():
    tokens, slots = torch.tensor([3, -1, 8, 0]), torch.tensor([0, 2, -1, 5])
    inputs, positions, counters, counts, ring, step = state(4)
    before = [x.clone() for x in (inputs, positions, counters, counts)]
    advance(tokens, slots, inputs, positions, counters, counts, ring, step)
    assert step.tolist() == [5]
    assert ring.tolist() == [[-7] * 6, [3, -1, -7, 0, -7, -7], [-7] * 6]  # step 4 of a ring of 3 is line 1
    for row, (token, slot) in enumerate(zip(tokens.tolist(), slots.tolist(), strict=True)):
        moves, counted = int(slot >= 0), int(slot >= 0 and token >= 0)
        assert positions[row] == before[1][row] + moves and counters[row] == before[2][row] + moves
        assert inputs[row] == (token if counted else before[0][row])
        expected = before[3][row].tolist()
        expected[max(token, 0)] += counted
        assert counts[row].tolist() == expected


def test_the_ring_keeps_the_last_steps():
    *rest, ring, step = state(2)
    for token in range(7):
        advance(torch.tensor([token, token]), torch.tensor([0, 1]), *rest, ring, step)
    assert ring[:, 0].tolist() == [5, 6, 4] and step.tolist() == [11]  # it began at step 4
