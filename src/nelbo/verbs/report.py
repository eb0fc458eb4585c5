"""``nelbo report``."""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from nelbo.errors import UserError

__all__ = ["Report", "carry_out"]


@dataclass(frozen=True)
class Report:
    """One self-contained HTML page about one run or several."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders."""
    out: Path | None = None
    """The page. By default report.html in the first run."""
    checkpoint: str = "best"
    """best, last or a step."""


def carry_out(command: Report) -> None:
    """Carry it out."""
    from nelbo.report import write_report

    if not command.runs:
        raise UserError("report needs at least one run folder")
    page = write_report(list(command.runs), command.out or command.runs[0] / "report.html", command.checkpoint)
    from rich.console import Console
    from rich.table import Table

    from nelbo.report.runs import read_runs
    from nelbo.report.tables import figures_table, group_runs

    for group in group_runs(read_runs(list(command.runs), command.checkpoint)):
        figures = figures_table(group)
        table = Table(*figures.head, title=figures.caption)
        for row in figures.rows:
            table.add_row(row.name, *(f"{cell.value} {cell.error}".strip() for cell in row.cells))
        Console(width=None if sys.stdout.isatty() else 110).print(table)
    print(f"written: {page}")
