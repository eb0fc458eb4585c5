"""What several verbs take."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nelbo.errors import UserError

__all__ = ["Drawing", "Run", "Weights", "set_threads"]

Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Weights = Literal["ema", "raw"]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How samples of a run are drawn."""

    method: Literal["ancestral", "ddim", "ode"] = "ancestral"
    """ancestral: steps of p(z_s|z_t); ddim: larger strides along the same estimates, deterministic by default; ode: the
    probability flow, with as many evaluations as the tolerance needs."""
    steps: int | None = None
    """ancestral, ddim: steps. By default 256, or all there are between the noise levels of a table (DDPM)."""
    spacing: Literal["even", "quadratic"] = "even"
    """ancestral, ddim: times equal in t or in its root; with few steps quadratic keeps fine detail."""
    eta: float = 0.0
    """ddim: share of the noise, from 0, none, to 1, that of ancestral with fixed-small."""
    variance: Literal["fixed-small", "fixed-large", "learned"] | None = None
    """ancestral: variance of the steps (DDPM's beta~, beta, or the network's). By default the model's own."""
    clip: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """ancestral, ddim: keep x_hat within the grey levels at every step, even where the model does not."""
    rtol: float = 3e-4
    """ode: relative tolerance per pixel, in units of the noise there."""
    atol: float = 3e-4
    """ode: absolute tolerance per pixel, in units of the noise there."""
    precision: Literal["float32", "bf16"] = "float32"
    """Of the network. bf16 changes a grey level here and there and is quicker where the processor has it."""
    seed: int = 0
    """Seed of the samples; sample k does not depend on the count."""


def set_threads(threads: int | None) -> None:
    """CPU threads of torch; None leaves them as they are."""
    if threads is None:
        return
    if threads < 1:
        raise UserError(f"--threads must be at least 1, got {threads}")
    import torch

    torch.set_num_threads(threads)
