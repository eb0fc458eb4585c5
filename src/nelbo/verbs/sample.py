"""``nelbo sample``."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from nelbo.errors import UserError
from nelbo.verbs.shared import Drawing, Run, Weights, set_threads

__all__ = ["Sample", "carry_out"]


@dataclass(frozen=True, kw_only=True)
class Sample(Drawing):
    """Draw images from a run: RUN/samples/NAME.npz and .png, and the denoising trajectory as a strip."""

    run: Run
    """A run folder; or a shared model or a diffusers pipeline of a DDPM, its folder or hub id."""
    count: int = 64
    """Images."""
    decoding: Literal["argmax", "categorical"] = "argmax"
    """The most probable levels of p(v|z_0), or a draw of it."""
    shard: int | None = None
    """For many images: so many a file, in the folder NAME/, with a grid of each; killed, the same command goes on."""
    interpolate: tuple[str, ...] = ()
    """Instead of samples, a strip from one image to another: two image files, or numbers of the test split. ddim and
    ode: between their noise at t = 1, spherically; ancestral: between the two noised, as in DDPM."""
    points: int = 11
    """--interpolate: images in the strip, at even weights from 0 to 1."""
    time: float = 0.5
    """--interpolate by ancestral: the t that the two are noised to; the nearest step below it is taken."""
    shared_noise: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """--interpolate by ancestral: both get the same noise, so that mixtures are as noisy as the network expects."""
    checkpoint: str = "best"
    """best, last or a step."""
    weights: Weights = "ema"
    """The moving average of the weights, or the raw ones."""
    batch: int | None = None
    """Images at once. By default as many as half of the free memory holds, on a CPU 256 at most."""
    trajectory: int = 8
    """ancestral, ddim: images shown on their way from noise; 0 for no strip."""
    out: Path | None = None
    """Path of the files without suffix, with --shard the folder. By default RUN/samples/ (evaluations/NAME/samples/
    here for others' checkpoints) and a name made of the settings."""
    device: str | None = None
    """cpu, cuda, cuda:1, ... By default a GPU where there is one."""
    threads: int | None = None
    """CPU threads. By default what PyTorch takes."""


def carry_out(command: Sample) -> None:
    """Carry it out."""
    set_threads(command.threads)
    from nelbo import checkpoints, sampling
    from nelbo.devices import choose_device
    from nelbo.group import join
    from nelbo.progress import Progress
    from nelbo.resolve import resolve

    settings = sampling.Settings(**{f.name: getattr(command, f.name) for f in dataclasses.fields(sampling.Settings)})
    between = _between(command)
    sampling.check(settings, between)
    group = join(command.device)
    device = choose_device(command.device)
    source = resolve(command.run, command.checkpoint, command.weights)
    group.agree(source.identity, f"weights of {command.run}")
    model = source.load(source.levels or 256, device)
    settings = sampling.resolved(settings, model, source.name)
    stem = command.out or source.folder / "samples" / sampling.name_of(settings, source, command.weights, between)
    if group.main:
        checkpoints.make_folder(stem.parent)
    if between is not None:
        if not group.main:  # a row of images is one batch
            return
        paths = sampling.interpolate_to_files(model, stem, settings, between, source)
    else:
        with Progress(shown=group.main) as progress:

            def seen(done: int) -> None:
                progress.update("sampling", done, settings.count)

            if settings.shard is None:
                paths = sampling.sample_to_files(model, stem, settings, seen)
            else:
                sampling.sample_to_shards(model, stem, settings, sampling.identity(source, command.weights), seen)
                paths = [stem]
    if group.main:
        print("written: " + ", ".join(map(str, paths)))


def _between(command: Sample) -> Any:
    """The interpolation that was asked for, or None."""
    from nelbo import sampling

    if command.interpolate:
        return sampling.Between(command.interpolate, command.points, command.time, command.shared_noise)
    for name in ("points", "time", "shared_noise"):
        if getattr(command, name) != getattr(Sample, name):
            raise UserError(f"--{name.replace('_', '-')} belongs to --interpolate A B, and there is none")
    return None
