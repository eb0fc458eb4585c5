"""``nelbo train``."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nelbo.config import Config, to_dict
from nelbo.errors import UserError
from nelbo.verbs.shared import set_threads

__all__ = ["Train", "carry_out"]


@dataclass(frozen=True)
class Train:
    """Train a preset, or continue a run: the same command again resumes."""

    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    out: Path | None = None
    """Folder of the run: new, empty, or a run to continue."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the resolved configuration and stop."""
    init_from: Path | None = None
    """A run, a checkpoint folder or a shared model (folder or hub id) from whose weights a new run starts."""
    init_optimizer: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """With --init-from: take over the optimizer's moments too."""
    threads: int | None = None
    """CPU threads. By default what PyTorch takes; use 1 beside other work."""


def carry_out(command: Train, name: str) -> None:
    """Carry it out."""
    if command.dry_run:
        print(json.dumps({"preset": name, "config": to_dict(command.config)}, indent=2))
        return
    if command.out is None:
        raise UserError("train needs --out RUN, the folder of the run")
    if command.init_optimizer and command.init_from is None:
        raise UserError("--init-optimizer needs --init-from RUN_OR_CHECKPOINT")
    set_threads(command.threads)
    from nelbo import training
    from nelbo.group import join
    from nelbo.progress import Progress

    total = command.config.training.steps
    with Progress(shown=join().main) as progress:

        def show(step: int, bits: float, rate: float) -> None:
            progress.update("training", step, total, "" if bits != bits else f"{bits:.3f} bits/dim", rate)

        training.train(
            command.config,
            command.out,
            preset=name,
            init_from=command.init_from,
            init_optimizer=command.init_optimizer,
            show=show,
        )
