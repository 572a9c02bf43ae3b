"""Everything wrong with a checkpoint is collected here and raised as one error, so that a repair needs one round."""

from pathlib import Path

from dsv4.errors import CheckpointError


class Faults:
    """A list of faults; each names what was found, what was expected and, where it helps, what to do."""

    def __init__(self) -> None:
        self.items: list[str] = []

    def add(self, text: str) -> None:
        if text not in self.items:
            self.items.append(text)

    def __len__(self) -> int:
        return len(self.items)

    def raise_if_any(self, path: Path | str) -> None:
        """CheckpointError listing every fault found so far at `path`; nothing when there is none."""
        if not self.items:
            return
        count = "1 problem" if len(self.items) == 1 else f"{len(self.items)} problems"
        raise CheckpointError(f"cannot load {path}: {count}\n" + "\n".join(f"  - {item}" for item in self.items))
