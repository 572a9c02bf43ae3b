"""The rows and rotations of a decode step, made on the device from positions: shapes never depend on a length."""

from collections.abc import Sequence

from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.launch import contiguous, same_device
from dsv4.kernels.loader import Kernel
from dsv4.kernels.op import op
from dsv4.kernels.step_plan.rows import Kind, StepRows
from dsv4.kernels.step_plan.step_plan_ref import step_plan_ref

_MAX_KINDS = 2
_KIND = "pppppppppp" + "iiiiiqi"
_KERNEL = Kernel("step_plan", "ppp" + "iiii" + "ppppp" + _MAX_KINDS * _KIND)


@op("step_plan", ref=step_plan_ref, shapes={"slots": "B : i64", "positions": "B : i64", "freqs": "n R : f32"})
def step_plan(
    slots: Tensor,
    positions: Tensor,
    freqs: Tensor,
    tables: Sequence[Tensor],
    kinds: Sequence[Kind],
    window: int,
    *,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    """What B rows of one token each read and write, as StepRows.tensors() lists it. One launch.

    slots [B] i64: a row's slot in the cache, -1 = padding; positions [B] i64: its token's position, anything where the
    slot is -1; freqs [n, R/2] f32; for each of `kinds` (at most two) its page table [S, P'] i64, P' >= P. A padding
    row sees nothing, writes nothing, turns by nothing. A position whose entries lie beyond 64 * P, or a slot beyond S,
    stops the kernel with an assertion. -> window_rows [B, W], window_to [B], sequence [B] i64, token_cis, back_cis [n,
    B, R/2, 2] f32 and, per kind, phase, write_to [B], items [B, n], entry_positions, entry_to, visible [B], pages
    [B, P], all_rows [B, E] i64, cis [B, R/2, 2] f32.
    """
    batch, turns = len(slots), freqs.shape[1]
    if len(kinds) > _MAX_KINDS or len(kinds) != len(tables):
        raise KernelError(
            f"step_plan: {len(kinds)} kinds of compressed layers with {len(tables)} page tables; the kernel takes as "
            f"many tables as kinds, at most {_MAX_KINDS}"
        )
    contiguous("step_plan", slots=slots, positions=positions, freqs=freqs)
    same_device("step_plan", slots.device, positions=positions, freqs=freqs)
    if out is None:
        out = StepRows.empty(batch, window, freqs, tuple(kinds)).tensors()
    contiguous("step_plan", **{f"out[{i}]": tensor for i, tensor in enumerate(out)})
    arguments: list[Tensor | int | None] = [slots, positions, freqs, batch, window, len(freqs), turns, *out[:5]]
    for i in range(_MAX_KINDS):
        if i >= len(kinds):
            arguments += [None] * 10 + [0] * 7
            continue
        kind, table = kinds[i], tables[i]
        if table.shape[1] < kind.pages or kind.width > 64 * kind.pages or table.stride(1) != 1:
            raise KernelError(
                f"step_plan: page table {list(table.shape)}, strides {list(table.stride())}, cannot give P = "
                f"{kind.pages} pages and E = {kind.width} entries per row"
            )
        same_device("step_plan", slots.device, table=table)
        sizes = [kind.ratio, kind.items, kind.place, kind.pages, kind.width, table.stride(0), len(table)]
        arguments += [table, *out[5 + 9 * i : 14 + 9 * i], *sizes]
    _KERNEL(slots.device, *arguments)
    return out
