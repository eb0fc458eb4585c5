"""``nelbo share``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nelbo.errors import UserError
from nelbo.verbs.shared import Run, Weights

__all__ = ["Share", "carry_out"]


@dataclass(frozen=True)
class Share:
    """A run's model as a folder to share, with a model card of its evaluations and samples; with --push also on the
    hub. `nelbo.load`, and every verb that takes a RUN, takes the folder or the hub id."""

    run: Run
    """A run folder."""
    out: Path | None = None
    """The folder: new, empty, or one that a model of this run was shared in before."""
    checkpoint: str = "best"
    """best, last or a step."""
    weights: Weights = "ema"
    """The moving average of the weights, or the raw ones."""
    license: str | None = None
    """The hub's identifier of a license, such as mit; none by default."""
    draw: int = 0
    """Samples to draw for the picture, where the run has none of these weights."""
    push: str | None = None
    """Upload the folder to the hub as OWNER/NAME, with the login of `hf auth login` or HF_TOKEN."""
    private: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """--push: make the repository private."""


def carry_out(command: Share) -> None:
    """Carry it out."""
    from nelbo import sharing

    if command.out is None:
        raise UserError("share needs --out FOLDER, where the model is written")
    if command.private and command.push is None:
        raise UserError("--private belongs to --push OWNER/NAME, and there is none")
    sharing.save_pretrained(
        command.run,
        command.out,
        command.checkpoint,
        command.weights,
        license=command.license,
        repo=command.push,
        draw=command.draw,
        say=print,
    )
    if command.push is not None:
        print(f"pushed: {sharing.push_to_hub(command.out, command.push, command.private)}")
