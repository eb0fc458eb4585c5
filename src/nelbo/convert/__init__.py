"""Other programs' checkpoints, read as data, into runs of nelbo; and a run's network into a folder of diffusers.

A converter is a function (source, base) -> Converted. ``base`` is the configuration of a preset: what a checkpoint does
not say comes from it, what its shapes say replaces it, and both are told. One that cannot know the size of the images
takes ``images`` too, what the user said of it. Reading never executes code.
"""

import importlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nelbo import checkpoints
from nelbo.config import Config, to_dict
from nelbo.errors import UserError

__all__ = ["CONVERTERS", "DEFAULT_PRESETS", "Converted", "Images", "converter", "known_images", "write_run"]


@dataclass(frozen=True)
class Images:
    """What the user says of the images: height and width, and grey levels; None where nothing is said."""

    size: tuple[int, int] | None = None
    levels: int | None = None


@dataclass(frozen=True)
class Converted:
    """A foreign checkpoint as nelbo has it.

    ``config`` builds its model for images of ``shape`` (C, H, W), ``levels`` and ``classes``; ``weights``: "raw", "ema"
    or both -> names of DiffusionModel's state -> tensors; ``optimizer``: "exp_avg.NAME", "exp_avg_sq.NAME" and
    "step.NAME" of every parameter, where the file has moments; ``step``; ``origin``: program, file, what was inferred,
    for run.json; ``notes``: lines for people on what was inferred, what the preset said, what was left out and why.
    """

    config: Config
    shape: tuple[int, int, int]
    levels: int
    weights: dict[str, dict[str, Any]]
    step: int
    origin: dict[str, Any]
    classes: int | None = None
    optimizer: dict[str, Any] | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)


def write_run(converted: Converted, out: Path, preset: str = "") -> Path:
    """A run folder with one checkpoint, whole or not at all; weights that are missing are those that there are.

    UserError where the weights do not fit the configuration's model, or ``out`` holds something.
    """
    from nelbo.compose import build_model, parameters_by_part
    from nelbo.devices import versions

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out needs a new or empty folder, and {out} holds something")
    config, shape, levels = converted.config, converted.shape, converted.levels
    model = build_model(config, shape, levels, converted.classes)
    for weights in converted.weights.values():
        checkpoints.load_weights(model, weights, Path(converted.origin["source"]))
    either = next(iter(converted.weights.values()))
    tensors = {file: converted.weights.get(kind, either) for kind, file in checkpoints.WEIGHTS.items()}
    if converted.optimizer is not None:
        tensors[checkpoints.OPTIMIZER] = converted.optimizer
    parts, source = parameters_by_part(model), config.data.source
    meta = {
        "step": converted.step, "images": converted.step * config.training.batch, "seconds": 0.0, "best": None,
        "window": {}, "versions": versions(),
    }  # fmt: skip
    data = {
        "name": source, "version": "unknown", "shape": list(shape), "levels": levels, "classes": converted.classes,
        "description": f"{source}, as the configuration says: the checkpoint does not hold what it was trained on",
    }  # fmt: skip
    record = {
        "format": checkpoints.FORMAT, "preset": preset, "config": to_dict(config), "data": data,
        "parameters": sum(parts.values()), "parameters_by_part": parts, "init": None, "versions": versions(),
        "threads": None, "created": datetime.now(UTC).isoformat(timespec="seconds"), "converted": converted.origin,
    }  # fmt: skip
    aside = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        try:
            checkpoints.save_checkpoint(aside, tensors, meta, 1)
            checkpoints.write_json(aside / "run.json", record)
            os.replace(aside, out)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    except OSError as error:
        raise checkpoints.cannot_write(error, out) from error
    return out


def known_images(base: Config) -> tuple[tuple[int, int, int], int] | None:
    """Shape (C, H, W) and grey levels of the data set that a configuration names, where it is known or is a file here.

    Official sets are not loaded: they need not be on this machine.
    """
    from nelbo.data import load
    from nelbo.data.official import LEVELS, OFFICIAL
    from nelbo.data.sources import SOURCES

    source = base.data.source
    if source in OFFICIAL:
        return OFFICIAL[source].shape, LEVELS
    if source not in SOURCES and not Path(source).expanduser().exists():
        return None

    data = load(source)
    return data.shape, data.levels


def converter(kind: str) -> Callable[[Path, Config], Converted]:
    """The converter of that kind; its module, and what that needs, is loaded now."""
    if kind not in CONVERTERS:
        raise UserError(f"--from must be one of {', '.join(CONVERTERS)}, got {kind!r}")
    module, name = CONVERTERS[kind].split(":")
    found: Callable[[Path, Config], Converted] = getattr(importlib.import_module(f"nelbo.convert.{module}"), name)
    return found


# Where a file leaves no choice that matters. MuLAN's and i-DODE's do not say whether they estimate noise or velocity.
DEFAULT_PRESETS = {
    "vdm": "vdm-cifar10",
    "addtt": "vdm-cifar10",
    "denoising-diffusion-pytorch": "ddpm-cifar10",
    "diffusers": "ddpm-cifar10",
}
CONVERTERS = {
    "mulan": "flax_checkpoints:mulan",
    "idode": "flax_checkpoints:idode",
    "vdm": "flax_checkpoints:vdm",
    "addtt": "addtt:convert",
    "denoising-diffusion-pytorch": "denoising_diffusion_pytorch:convert",
    "diffusers": "diffusers:convert",
}
