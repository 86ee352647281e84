"""Progress on stderr: a bar on a terminal, nothing but log lines otherwise."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Moves a bar on."""

    def __call__(self, steps: int = 1, note: str = "") -> None:
        """Move on by `steps` and show a note beside the bar."""


@contextmanager
def progress(label: str, total: int, done: int = 0, shown: bool = True) -> Iterator[Advance]:
    """Show a bar while the block runs; it vanishes when the block ends.

    Args:
        label: What is being done.
        total: Steps in all.
        done: Steps already done by an earlier process.
        shown: Whether to draw at all (one process of several draws).
    """
    if not shown or not sys.stderr.isatty() or total == 0:
        yield lambda steps=1, note="": None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=total, completed=done, note="")

        def advance(steps: int = 1, note: str = "") -> None:
            bars.update(task, advance=steps, note=note)

        yield advance
