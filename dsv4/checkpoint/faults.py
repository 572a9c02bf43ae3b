"""Everything wrong with a checkpoint is collected here and raised as one error, so that a repair needs one round."""

from pathlib import Path

from dsv4.errors import CheckpointError


class Faults:
    """A list of faults; each names what was found, what was expected and, where it helps, what to do."""

    def __init__(self) -> None:
        self._items: dict[str, None] = {}  # ordered, and each fault once

    @property
    def items(self) -> list[str]:
        return list(self._items)

    def add(self, text: str) -> None:
        self._items[text] = None

    def __len__(self) -> int:
        return len(self._items)

    def raise_if_any(self, path: Path | str) -> None:
        """CheckpointError listing every fault found so far at `path`; nothing when there is none."""
        if not self._items:
            return
        count = "1 problem" if len(self._items) == 1 else f"{len(self._items)} problems"
        raise CheckpointError(f"cannot load {path}: {count}\n" + "\n".join(f"  - {item}" for item in self._items))
