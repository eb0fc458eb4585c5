"""``nelbo convert`` and ``nelbo export``: others' checkpoints as runs, and runs as others read them."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nelbo import presets
from nelbo.arguments import parse
from nelbo.config import Config, to_dict
from nelbo.convert import CONVERTERS, DEFAULT_PRESETS
from nelbo.errors import UserError
from nelbo.verbs.shared import Run, Weights

__all__ = ["Convert", "Export", "carry_out", "convert_arguments", "export"]


@dataclass(frozen=True)
class Convert:
    """Somebody else's checkpoint as a run. Sizes are read off its shapes; what it does not say comes from a preset, and
    from flags that override single fields of it."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """The file; for mulan, idode and vdm also a folder, whose ckpt-N.flax with the largest N is taken."""
    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    program: Annotated[str, tyro.conf.arg(name="from", metavar="|".join(CONVERTERS))]
    """The program that wrote it."""
    preset: str = ""
    """The preset that says what the checkpoint does not: path, parameterization, objective, ends of gamma, data ..."""
    out: Path | None = None
    """Folder of the run: new, or empty."""
    size: tuple[int, int] | None = None
    """Height and width of the images, where neither the checkpoint nor the preset's data set tells them."""
    levels: int | None = None
    """Grey levels of the images. By default those of the preset's data set where its images fit, otherwise 256."""


@dataclass(frozen=True)
class Export:
    """A run's model in the format of another program: a run of a ddpm-* preset as a pipeline of diffusers."""

    run: Run
    """A run folder."""
    to: Literal["diffusers"] = "diffusers"
    """The program: diffusers' DDPMPipeline.from_pretrained loads the folder."""
    out: Path | None = None
    """Folder to write: new, or empty."""
    checkpoint: str = "best"
    """best, last or a step."""
    weights: Weights = "ema"
    """The moving average of the weights, or the raw ones."""


def export(command: Export) -> None:
    """Carry it out."""
    if command.out is None:
        raise UserError("export needs --out FOLDER, where the model is written")
    from nelbo.convert.diffusers import save_diffusers

    print(f"written: {save_diffusers(command.run, command.out, command.weights, command.checkpoint)}")


def carry_out(command: Convert) -> None:
    """Carry it out."""
    from nelbo import checkpoints, convert

    if command.out is None:
        raise UserError("convert needs --out RUN, the folder of the run")
    read = convert.converter(command.program)
    said = convert.Images(command.size, command.levels)
    if "images" in inspect.signature(read).parameters:
        found = read(command.source, command.config, images=said)  # type: ignore[call-arg]
    elif said != convert.Images():
        raise UserError(f"--size and --levels do not go with --from {command.program}, whose files say them")
    else:
        found = read(command.source, command.config)
    run = convert.write_run(found, command.out, command.preset)
    print(f"preset {command.preset}")
    for note in found.notes:
        print(note)
    record = checkpoints.read_run(run)
    counts = ", ".join(f"{name} {count:,}" for name, count in record["parameters_by_part"].items())
    print(f"{record['parameters']:,} parameters ({counts}), step {found.step}")
    print(f"written: {run}")
    moments = " --init-optimizer" * (found.optimizer is not None)
    changed = " ".join(_changes(presets.preset(command.preset), found.config))
    print(f"to train on: nelbo train {command.preset} --init-from {run}{moments} --out ... {changed}".rstrip())


def _changes(base: Config, config: Config) -> list[str]:
    """The flags that turn one configuration into another."""
    before, after = to_dict(base), to_dict(config)
    found: list[str] = []
    for group, values in after.items():
        for name, value in values.items() if isinstance(values, dict) else (("", values),):
            if value != (before[group][name] if name else before[group]):
                flag = "--" + (f"{group}.{name}" if name else group).replace("_", "-")
                found += [flag, *map(str, value if isinstance(value, list) else [value])]
    return found


def convert_arguments(arguments: list[str]) -> Convert:
    """The arguments of ``convert``; the preset that they name is the default of every field."""
    import argparse

    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--from", dest="program")
    early.add_argument("--preset")
    try:
        given, rest = early.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; see `nelbo convert --help`") from None
    if {"-h", "--help"} & set(arguments):
        print("usage: nelbo convert SOURCE --from KIND --out RUN [--preset NAME] [--field value]\n")
        given.preset = given.preset or "vdm-cifar10"
    elif given.program not in CONVERTERS:
        raise UserError(f"--from must be one of {', '.join(CONVERTERS)}, got {given.program or 'nothing'}")
    name = given.preset or DEFAULT_PRESETS.get(given.program)
    if name is None:
        raise UserError(
            f"--preset is needed for --from {given.program}, whose checkpoints do not say what the network estimates; "
            f"the choices are {', '.join(n for n in presets.PRESETS if n.startswith(given.program))}"
        )
    program = given.program or tyro.MISSING
    default = Convert(source=tyro.MISSING, config=presets.preset(name), program=program, preset=name)
    return parse(Convert, rest, "convert", default)
