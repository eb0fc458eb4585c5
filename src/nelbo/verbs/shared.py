"""What several verbs take."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from nelbo.errors import UserError

__all__ = ["Run", "Weights", "set_threads"]

Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Weights = Literal["ema", "raw"]


def set_threads(threads: int | None) -> None:
    """CPU threads of torch; None leaves them as they are."""
    if threads is None:
        return
    if threads < 1:
        raise UserError(f"--threads must be at least 1, got {threads}")
    import torch

    torch.set_num_threads(threads)
