"""One self-contained HTML page that reads a run or compares several (``write_report``). Importing this package loads
neither torch nor matplotlib."""

from nelbo.report.page import write_report

__all__ = ["write_report"]
