"""One self-contained HTML page that reads a run or compares several (``write_report``), and ``latent_use``, which
measures whether a model uses its auxiliary latent. Importing this package loads neither torch nor matplotlib."""

from typing import Any

from nelbo.report.page import write_report

__all__ = ["latent_use", "write_report"]


def __getattr__(name: str) -> Any:
    if name == "latent_use":
        from nelbo.report.schedules import latent_use

        return latent_use
    raise AttributeError(f"module 'nelbo.report' has no attribute {name!r}")
