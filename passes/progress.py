"""Progress bars (rich) that are silent when standard error is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], label: str, *, total: int | None = None, enabled: bool = True, status: Callable[[], str] | None = None) -> Iterator[T]:
    """Iterate `items` under a bar with count and time left; plain iteration when disabled or not at a terminal.

    What `status` says after an item stands beside the label.
    """
    if not enabled or not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        for item in bar.track(items, total=total, task_id=task):
            yield item
            if status is not None:
                bar.update(task, description=f"{label} {status()}")


@contextmanager
def spinner(label: str, *, enabled: bool = True) -> Iterator[None]:
    """Show that something of unknown length is going on; silent when disabled or not at a terminal."""
    if not enabled or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(label):
        yield
