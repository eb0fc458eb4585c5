"""One self-contained HTML page that reads a run or compares several: ``write_report``.

Importing this package loads neither torch nor matplotlib. ``nelbo.report.schedules.latent_use`` measures whether a
model uses its auxiliary latent; ``nelbo evaluate`` calls it too.
"""

from nelbo.report.page import write_report

__all__ = ["write_report"]
