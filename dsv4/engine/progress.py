"""A progress bar on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress


@contextmanager
def progress_bar(label: str, total: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    """Gives a function that advances the bar by one; without a terminal, or not `shown`, it does nothing."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)
