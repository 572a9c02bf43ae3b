"""Replay against eager, bit for bit, and both with poison wherever no row of the step may look."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4.engine.guard.driver import driver
from dsv4.engine.guard.findings import Finding
from dsv4.engine.guard.step import Step, Subject
from dsv4.kvcache import KVCache
from dsv4.model import Model

POISON = 0xFF  # everywhere: NaN in BF16, float32 and E4M3 and as a scale, -1 as an integer
_CHAIN = 2  # steps that follow one another without a stage between
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Bits = dict[str, Tensor]


def compare(step: Step, subject: Subject, slots: Sequence[int], tokens: Sequence[int], label: str) -> list[Finding]:
    """The same steps eagerly and by replay, from the same memory: outputs of the live rows and all memory must agree.
    The graph's private pool is poisoned first, so a replay that relies on what an earlier one left there is found.
    """
    memory, state = subject.memory(), own_tensors(step)
    before, state_before = copied(memory), copied(state)

    def run(how: Callable[[], None]) -> Bits:
        restore(memory, before)
        restore(state, state_before)
        return _run(step, slots, tokens, how, _CHAIN)

    eager = run(step.body)
    eager_memory = copied(memory)
    poison_pool(step)
    replayed = run(step.replay)
    found = [
        *_not_finite(replayed, label),
        *_differences(eager, replayed, ("eager", "replay"), label),
        *_differences(eager_memory, memory, ("eager", "replay"), label),
    ]
    if found:
        found += _differences(eager, run(step.body), ("eager", "eager once more"), label)
    restore(memory, before)
    restore(state, state_before)
    return found


def poisoned(step: Step, subject: Subject, slots: Sequence[int], tokens: Sequence[int], label: str) -> list[Finding]:
    """Replay with poison in all memory that holds the past of none of `slots` (other slots, free pages, rows not yet
    written). The live rows' outputs must not change, and no row of memory but each sequence's next may be written.
    """
    memory, state = subject.memory(), own_tensors(step)
    before, state_before = copied(memory), copied(state)
    clean = _run(step, slots, tokens, step.replay)
    clean_memory = copied(memory)
    restore(memory, before)
    restore(state, state_before)
    writes = {name: _wide(mask, memory[name]) for name, mask in subject.writes(slots).items()}
    for name, mask in subject.unread(slots).items():
        raw(memory[name])[_wide(mask, memory[name])] = POISON
    expected = {
        name: torch.where(writes[name].unsqueeze(-1), raw(clean_memory[name]), raw(x)) for name, x in memory.items()
    }
    result = _run(step, slots, tokens, step.replay)
    found = _differences(clean, result, ("clean", "poisoned"), label)
    for name, x in memory.items():
        changed = (raw(clean_memory[name]) != raw(before[name])).any(-1)
        wrong = (raw(x) != expected[name]).any(-1)
        stray = (changed | wrong) & ~writes[name]
        found += _poison(f"{name}: %d rows were written that are no sequence's next", stray, label)
        found += _poison(f"{name}: %d rows depend on what no sequence of the step owns", wrong & writes[name], label)
    restore(memory, before)
    restore(state, state_before)
    return found


def _poison(what: str, rows: Tensor, label: str) -> list[Finding]:
    count = int(rows.sum())
    return [Finding("bits", "poison", f"{what % count}, first at {list(_first(rows))} ({label})")] if count else []


def live_memory(*, apart_from: tuple[int, int]) -> list[range]:
    """The addresses of tensors on the GPU that are not in the memory pool `apart_from`."""
    found = []
    for segment in torch.cuda.memory_snapshot():
        if tuple(segment["segment_pool_id"]) != tuple(apart_from):
            at = segment["address"]
            for block in segment["blocks"]:
                if block["state"] == "active_allocated":
                    found.append(range(at, at + block["size"]))
                at += block["size"]
    return found


def poison_pool(step: Step) -> None:
    """Overwrite the memory of the graph's private pool: whatever a replay reads there it must have written."""
    if step.graph is None:
        return
    pool = tuple(step.graph.pool())
    torch.cuda.synchronize()
    for segment in torch.cuda.memory_snapshot():
        if tuple(segment["segment_pool_id"]) == pool and segment["total_size"]:
            driver().fill(segment["address"], POISON, segment["total_size"])
    torch.cuda.synchronize()


def copied(tensors: Mapping[str, Tensor]) -> Bits:
    return {name: x.clone() for name, x in tensors.items()}


def restore(memory: Mapping[str, Tensor], saved: Bits) -> None:
    for name, x in memory.items():
        x.copy_(saved[name])


def raw(x: Tensor) -> Tensor:
    """x [..., N] as bytes [..., N * itemsize], the same memory."""
    return x.view(torch.uint8)


def own_tensors(step: Step) -> Bits:
    """The step's own buffers: its attributes, and those of dsv4's objects and containers among them. Two runs then
    start alike, whatever `stage` leaves as it was. The model and the cache are no part of the step.
    """
    found: Bits = {}
    for name, value in vars(step).items():
        if isinstance(value, Tensor):
            found[name] = value
            continue
        inner: dict[Any, Any] = {}
        if isinstance(value, Mapping):
            inner = dict(value)
        elif isinstance(value, list | tuple):
            inner = dict(enumerate(value))
        elif type(value).__module__.startswith("dsv4.") and not isinstance(value, Model | KVCache):
            inner = vars(value)
        found |= {f"{name}.{key}": x for key, x in inner.items() if isinstance(x, Tensor)}
    return found


def _run(step: Step, slots: Sequence[int], tokens: Sequence[int], how: Callable[[], None], steps: int = 1) -> Bits:
    """Outputs of the live rows, of each of the steps that follow one stage."""
    step.stage(slots, tokens)
    outputs: Bits = {}
    for i in range(steps):
        how()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        step_name = f" of step {i + 1}" if i else ""
        outputs |= {f"{name}{step_name}": x[: len(slots)].clone() for name, x in step.outputs().items()}
    return outputs


def _wide(mask: Tensor, x: Tensor) -> Tensor:
    """A mask over leading dimensions of x [..., N], over all of them but the last."""
    lead, mask = x.shape[:-1], mask.to(x.device)
    return mask.reshape(mask.shape + (1,) * (len(lead) - mask.dim())).expand(lead)


def _not_finite(outputs: Bits, label: str) -> list[Finding]:
    """NaN equals NaN bit for bit, so agreement alone would not show it."""
    return [
        Finding(
            "bits", "not finite", f"{name} of a live row holds NaN or infinity, first at {list(_first(bad))} ({label})"
        )
        for name, x in outputs.items()
        if x.is_floating_point() and bool((bad := ~x.isfinite()).any())
    ]


def _differences(a: Mapping[str, Tensor], b: Mapping[str, Tensor], who: tuple[str, str], label: str) -> list[Finding]:
    found = []
    for name, x in a.items():
        y, integer = b[name], _INTEGERS[x.element_size()]
        differs = x.contiguous().view(integer) != y.contiguous().view(integer)
        count = int(differs.sum())
        if count:
            at = _first(differs)
            values = f"{x[at].item()} {who[0]}, {y[at].item()} {who[1]}"
            what = f"{name}: {count} of {x.numel()} values differ, first at {list(at)}: {values} ({label})"
            found.append(Finding("bits", "bits", what))
    return found


def _first(mask: Tensor) -> tuple[int, ...]:
    flat = int(mask.flatten().to(torch.uint8).argmax())
    at = []
    for size in reversed(mask.shape):
        at.append(flat % size)
        flat //= size
    return tuple(reversed(at))
