"""Twin of step_plan."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.kernels.step_plan.rows import Kind


def _cis(positions: Tensor, freqs: Tensor) -> Tensor:
    """positions [B], freqs [..., R/2] -> [..., B, R/2, 2] f32: cos and sin of the float32 product."""
    angles = positions.float().unsqueeze(-1) * freqs.unsqueeze(-2)
    return torch.view_as_real(torch.polar(torch.ones_like(angles), angles))


def _kind(slots: Tensor, positions: Tensor, table: Tensor, freqs: Tensor, kind: Kind) -> tuple[Tensor, ...]:
    n, live = kind.items, slots >= 0
    device = slots.device
    done = live & ((positions + 1) % kind.ratio == 0)
    visible = torch.where(live, (positions + 1) // kind.ratio, 0)
    page = torch.arange(kind.pages, device=device)
    held = table[slots.clamp(min=0), : kind.pages]
    pages = held.masked_fill(page * 64 >= visible.unsqueeze(-1), -1)
    token = positions.unsqueeze(-1) - torch.arange(n - 1, -1, -1, device=device)  # oldest first
    items = slots.unsqueeze(-1) * n + token % n
    entry = torch.arange(kind.width, device=device)
    last = (visible - 1).clamp(min=0)
    last_row = pages.gather(1, (last // 64).unsqueeze(-1)).squeeze(-1) * 64 + last % 64
    entry_positions = torch.where(done, positions + 1 - kind.ratio, 0)
    return (
        torch.where(live, positions % kind.ratio, 0),
        torch.where(live, slots * n + positions % n, -1),
        items.masked_fill(~done.unsqueeze(-1) | (token < 0), -1),
        entry_positions,
        torch.where(done, last_row, -1),
        visible,
        pages,
        (pages[:, entry // 64] * 64 + entry % 64).masked_fill(entry >= visible.unsqueeze(-1), -1),
        _cis(entry_positions, freqs[kind.place]),
    )


def step_plan_ref(
    slots: Tensor,
    positions: Tensor,
    freqs: Tensor,
    tables: Sequence[Tensor],
    kinds: Sequence[Kind],
    window: int,
) -> tuple[Tensor, ...]:
    live = slots >= 0
    positions = torch.where(live, positions, 0)  # a padding row's may be anything
    age = torch.arange(window, device=slots.device)
    seen = (positions - window + 1).clamp(min=0).unsqueeze(-1) + age  # [B, W] oldest first
    window_rows = slots.unsqueeze(-1) * window + seen % window
    turns = _cis(positions, freqs)
    own = (
        window_rows.masked_fill(~live.unsqueeze(-1) | (seen > positions.unsqueeze(-1)), -1),
        torch.where(live, slots * window + positions % window, -1),
        torch.where(live, torch.arange(len(slots), device=slots.device), -1),
        turns,
        torch.stack((turns[..., 0], -turns[..., 1]), dim=-1),
    )
    return own + tuple(
        tensor
        for table, kind in zip(tables, kinds, strict=True)
        for tensor in _kind(slots, positions, table, freqs, kind)
    )
