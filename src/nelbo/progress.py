"""How far a long job is: a bar on a terminal, elsewhere a line now and then. Both on stderr."""

import sys
import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

__all__ = ["Progress"]


class Progress:
    """Tasks by name, each with its count, its figure of interest, images/s and the time that remains.

    Off a terminal: at most one line in ``every`` seconds, and one at a task's end. Nothing where not ``shown``.
    """

    def __init__(self, every: float = 10.0, shown: bool = True) -> None:
        self.shown = shown
        console = Console(stderr=True)
        self.terminal, self.every = console.is_terminal, every
        columns = (TextColumn("{task.description}", markup=False), BarColumn(None), MofNCompleteColumn())
        left = (TextColumn("{task.fields[figures]}", markup=False), TimeElapsedColumn())
        self.bar = Bar(
            *columns,
            *left,
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            expand=True,
            disable=not (self.terminal and shown),
        )
        self.tasks: dict[str, tuple[TaskID, float, int]] = {}  # name -> the bar's task, when it began and where
        self.printed = time.monotonic()

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def update(
        self, name: str, done: int, total: int, figure: str = "", rate: float | None = None, unit: str = "images"
    ) -> None:
        """``done`` of ``total``, a figure in words and images (or ``unit``) a second, measured without ``rate``.

        The first call for a task is its start.
        """
        now = time.monotonic()
        if name not in self.tasks:
            self.tasks[name] = self.bar.add_task(name, total=total, completed=done, figures=""), now, done
        task, began, first = self.tasks[name]
        if rate is None and done > first:
            rate = (done - first) / max(now - began, 1e-9)
        speed = "" if not rate or rate != rate else f"{rate:,.0f}" if rate >= 100 else f"{rate:.2g}"
        shown = ", ".join(part for part in (figure, f"{speed} {unit}/s" if speed else "") if part)
        self.bar.update(task, completed=done, figures=shown)
        if self.shown and not self.terminal and done > first and (done == total or now - self.printed >= self.every):
            left = (now - began) / (done - first) * (total - done)
            remains = f", {timedelta(seconds=round(left))} left" if done < total else ""
            print(f"{name} {done}/{total}: {shown}{remains}", file=sys.stderr, flush=True)
            self.printed = now
