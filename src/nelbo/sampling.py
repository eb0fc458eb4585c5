"""Samples on disk: batches of any number, the trajectory of the first few, pictures beside arrays, shards of many.

Sample k is keyed by seed and number: it is the same whatever the count, the batch, the shard or how often the process
was killed (a network's float32 rounding may differ from one batch size to another). Processes that were launched
together (group.py) share the batches, or the shards.
"""

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nelbo import checkpoints, pictures, pixels, samplers
from nelbo.data import load
from nelbo.data.files import read_image
from nelbo.devices import full_float32
from nelbo.draws import Draws
from nelbo.errors import UserError
from nelbo.group import ALONE, Group, joined
from nelbo.latents import Label
from nelbo.likelihood import SolverError
from nelbo.memory import most_rows
from nelbo.model import DiffusionModel
from nelbo.resolve import Source
from nelbo.shards import Shards, read_shards

__all__ = [
    "Between",
    "Settings",
    "check",
    "draw",
    "interpolate_to_files",
    "name_of",
    "read_shards",
    "resolved",
    "sample_to_files",
    "sample_to_shards",
]

MOMENTS = 10


@dataclass(frozen=True)
class Settings:
    """What is drawn, and how: the fields of samplers.Chain (``steps`` None: see ``resolved``) and of the ODE."""

    count: int = 64
    method: str = "ancestral"
    steps: int | None = None
    spacing: str = "even"
    eta: float = 0.0
    variance: str | None = None
    clip: bool = False
    rtol: float = 3e-4
    atol: float = 3e-4
    decoding: str = "argmax"
    seed: int = 0
    batch: int | None = None
    precision: str = "float32"
    trajectory: int = 8
    shard: int | None = None

    @property
    def chain(self) -> dict[str, Any]:
        """The fields of a Chain."""
        return {f.name: getattr(self, f.name) for f in fields(samplers.Chain)}


@dataclass(frozen=True)
class Between:
    """An interpolation: two image files, or numbers of the test split; ``points`` weights from 0 to 1; ``time`` and
    ``shared_noise`` of the ancestral one (samplers.py, equation 4)."""

    ends: tuple[str, ...]
    points: int = 11
    time: float = 0.5
    shared_noise: bool = False


CHAIN = samplers.METHODS
BELONGS = {
    "steps": CHAIN, "spacing": CHAIN, "clip": CHAIN, "eta": ("ddim",), "variance": ("ancestral",),
    "rtol": ("ode",), "atol": ("ode",),
}  # fmt: skip
WITHOUT_SHARDS = ("trajectory",)
NOT_BETWEEN = ("count", "shard", "decoding", "trajectory", "eta", "batch")
WHAT = ("batch", "trajectory", "shard", "count")  # no part of what sample k is
STEPS = 256
PRECISIONS = {"float32": None, "bf16": torch.bfloat16}


# Settings ------------------------------------------------------------------------------------------------------------


def _refuse(settings: Settings, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if getattr(settings, name) != getattr(Settings, name):
            raise UserError(f"--{name.replace('_', '-')} {why}")


def check(settings: Settings, between: Between | None = None) -> None:
    """UserError where a setting is out of range, or belongs to another method."""
    for name in ("count", "steps", "batch", "shard"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    if not 0 <= settings.seed < 2**64 or settings.trajectory < 0:
        raise UserError(
            "--seed must lie in 0 .. 2^64 - 1 and --trajectory be 0 or more, "
            f"got {settings.seed} and {settings.trajectory}"
        )
    for name, methods in BELONGS.items():
        if settings.method not in methods:
            _refuse(
                settings, (name,), f"belongs to --method {' or '.join(methods)}, and the method is {settings.method}"
            )
    if not 0 <= settings.eta <= 1:
        raise UserError(f"--eta must lie in [0, 1], got {settings.eta}")
    for name in ("rtol", "atol"):
        if not 0 < getattr(settings, name) < 1:
            raise UserError(f"--{name} must lie between 0 and 1, got {getattr(settings, name)}")
    if settings.shard is not None:
        _refuse(settings, WITHOUT_SHARDS, "is of samples in one file: it does not go with --shard")
    if between is not None:
        _check_between(settings, between)


def _check_between(settings: Settings, between: Between) -> None:
    _refuse(settings, NOT_BETWEEN, "is of samples: it does not go with --interpolate")
    if len(between.ends) != 2:
        raise UserError(f"--interpolate needs two images, A B, got {len(between.ends)}: {' '.join(between.ends)}")
    if between.points < 2:
        raise UserError(f"--points must be at least 2, got {between.points}")
    if not 0 < between.time <= 1:
        raise UserError(f"--time must lie in (0, 1], got {between.time}")
    if settings.method != "ancestral":
        for name in ("time", "shared_noise"):
            if getattr(between, name) != getattr(Between, name):
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option} belongs to --method ancestral: by {settings.method} both go up to t = 1")
        _refuse(settings, ("clip",), "belongs to --method ancestral: what is clipped does not come back")


def resolved(settings: Settings, model: DiffusionModel, name: str) -> Settings:
    """The settings with ``steps`` said, by default all between the levels of a table, otherwise ``STEPS``, and
    ``batch``, by default what fits into the memory of every process. UserError where the model, called ``name``, cannot
    do what they ask for."""
    timesteps, method = model.schedule.timesteps, settings.method
    if model.schedule_reads_image and (method != "ancestral" or settings.variance):
        what = {"ode": "probability flow", "ddim": "DDIM"}.get(method, "other variance")
        raise UserError(f"the schedule of {name} reads the image: it has no {what}; use ancestral alone")
    if settings.variance == "learned" and not model.learned_variance:
        raise UserError(
            f"--variance learned: the network of {name} has no output for it; it has {model.reverse.variance}"
        )
    if settings.decoding == "categorical" and model.reverse.decoder == "gaussian":
        raise UserError(f"--decoding categorical: the decoder of {name} is gaussian, and its samples are its mean")
    if method == "ode":
        return replace(settings, batch=settings.batch or _batch(model, settings))
    if timesteps and settings.steps is not None and settings.steps >= timesteps:
        raise UserError(
            f"--steps must be at most {timesteps - 1}, the steps between the {timesteps} noise levels of {name}, got "
            f"{settings.steps}"
        )
    settings = replace(settings, steps=settings.steps or (timesteps - 1 if timesteps else STEPS))
    return replace(settings, batch=settings.batch or _batch(model, settings))


def _batch(model: DiffusionModel, settings: Settings) -> int:
    """Images at once that fit into the memory of every process."""
    few: dict[str, Any] = {"rtol": 0.9, "atol": 0.9} if settings.method == "ode" else {"steps": 1}
    quick = replace(settings, **few)

    def work(images: int) -> None:
        with contextlib.suppress(UserError):  # the memory of a solve that fails is the same
            _drawn(model, quick, range(images), None)

    return min(joined().ask(most_rows(work, model.device)))


def name_of(settings: Settings, source: Source, weights: str, between: Between | None = None) -> str:
    """A file name that says what differs from other samples of a source."""
    name = "" if source.step is None else f"step-{source.step}-"
    given = f"{settings.rtol:g}" if settings.method == "ode" else settings.steps
    name += f"{settings.method}-{given}-seed{settings.seed}"
    if between is None:
        name += f"-{settings.count}"
    else:
        name += f"-between-{'-'.join(Path(end).stem for end in between.ends)}-{between.points}"
        name += f"-t{between.time:g}" * (settings.method == "ancestral") + "-shared" * between.shared_noise
    for field in ("spacing", "variance"):
        if getattr(settings, field) != getattr(Settings, field):
            name += f"-{getattr(settings, field)}"
    name += f"-eta{settings.eta:g}" if settings.eta else ""
    words = {
        "clip": settings.clip, settings.precision: settings.precision != Settings.precision,
        settings.decoding: settings.decoding != Settings.decoding, weights: weights != "ema",
    }  # fmt: skip
    for word, chosen in words.items():
        name += f"-{word}" if chosen else ""
    return name


# Samples -------------------------------------------------------------------------------------------------------------


def draw(
    model: DiffusionModel, settings: Settings, numbers: range, seen: Callable[[int, Tensor, Tensor], None] | None = None
) -> np.ndarray:
    """The samples of these numbers, (n, C, H, W) uint8."""
    before, model.autocast = model.autocast, PRECISIONS[settings.precision]
    try:
        with full_float32():
            return _drawn(model, settings, numbers, seen)
    finally:
        model.autocast = before


def _drawn(
    model: DiffusionModel, settings: Settings, numbers: range, seen: Callable[[int, Tensor, Tensor], None] | None
) -> np.ndarray:
    options: dict[str, Any] = {
        "categorical": settings.decoding == "categorical", "seed": settings.seed, "first": numbers.start
    }  # fmt: skip
    if settings.method == "ode":
        drawn, flow = samplers.sample_ode(model, len(numbers), rtol=settings.rtol, atol=settings.atol, **options)
        if not flow.solution.success:
            raise UserError(flow.solution.advice)
    else:
        drawn = samplers.sample(model, len(numbers), seen=seen, **settings.chain, **options)
    return drawn.cpu().numpy()


def _batches(numbers: range, batch: int) -> list[range]:
    return [numbers[i : i + batch] for i in range(0, len(numbers), batch)]


def draw_all(
    model: DiffusionModel,
    settings: Settings,
    progress: Callable[[int], None] | None = None,
    seen: Callable[[int, Tensor, Tensor], None] | None = None,
    group: Group = ALONE,
) -> np.ndarray:
    """All ``settings.count`` samples, (count, C, H, W) uint8, in every process of the group, whose work they are.

    ``progress(images done)``; ``seen``, of the first batch only, where this process draws it.
    """
    assert settings.batch is not None  # of ``resolved``
    images = np.zeros((settings.count, *model.shape), dtype=np.uint8)
    batches = _batches(range(settings.count), settings.batch)
    if progress is not None:
        progress(0)
    for i in group.units(len(batches)):
        numbers = batches[i]
        images[numbers.start : numbers.stop] = draw(model, settings, numbers, seen if i == 0 else None)
        if progress is not None:
            progress(numbers.stop)
    group.merge(images)
    return images


def sample_to_files(
    model: DiffusionModel, stem: Path, settings: Settings, progress: Callable[[int], None] = lambda done: None
) -> list[Path]:
    """STEM.npz, STEM.png and, for the first images of a chain, STEM-trajectory.png of x_hat; their paths.

    ``progress`` is called with the images done.
    """
    group = joined()
    settings = resolved(settings, model, "the model")
    assert settings.batch is not None
    shown = min(settings.trajectory, settings.count, settings.batch)
    grid = torch.zeros(1) if settings.method == "ode" else samplers.Chain(**settings.chain).times(model, torch.zeros(1))
    steps = len(grid) - 1  # none by ODE
    moments = np.unique(np.linspace(0, steps - 1, min(MOMENTS, steps)).astype(int)) if shown else np.array([], int)
    trajectory = np.zeros((len(moments), shown, *model.shape), dtype=np.uint8)

    def seen(i: int, z: Tensor, x_hat: Tensor) -> None:
        if i in moments:
            trajectory[moments == i] = samplers.nearest_levels(model, x_hat[:shown]).cpu().numpy()

    images = draw_all(model, settings, progress, seen, group)
    group.merge(trajectory)
    paths: list[Path] = []
    if group.main:
        kept = trajectory if len(moments) else None
        paths = pictures.save_samples(stem, images, model.levels, kept, grid[moments + 1].numpy())
    return group.tell(paths)


def sample_to_shards(
    model: DiffusionModel,
    folder: Path,
    settings: Settings,
    source: dict[str, Any],
    progress: Callable[[int], None] = lambda done: None,
) -> list[Path]:
    """Shards of ``settings.shard`` images (shards.py) in a folder; complete ones that are there stay. Their paths.

    ``source`` (JSON) says of which weights they are: shards of others are not added to. One shard is in memory at a
    time in each process.
    """
    group = joined()
    settings = resolved(settings, model, "the model")
    assert settings.shard is not None and settings.batch is not None
    said = {k: v for k, v in asdict(settings).items() if k not in WHAT}
    if group.main:
        checkpoints.make_folder(folder)
    with checkpoints.locked(folder, "sampling into") if group.main else contextlib.nullcontext():
        begun = None
        if group.main:
            shards = Shards.begin(folder, said | source, settings.count, settings.shard, model.shape, model.levels)
            begun = shards.meta, [i for i in range(len(shards)) if not shards.complete(i)]
        meta, missing = group.tell(begun)
        shards = Shards(folder, meta)
        done = settings.count - sum(len(shards.numbers(i)) for i in missing)
        progress(done)
        for unit in group.units(len(missing)):
            i, images = missing[unit], []
            before = done + sum(len(shards.numbers(other)) for other in missing[:unit])
            for numbers in _batches(shards.numbers(i), settings.batch):
                images.append(draw(model, settings, numbers))
                progress(before + numbers.stop - shards.numbers(i).start)
            shards.write(i, np.concatenate(images))
        group.wait()
        for i in range(len(shards)) if group.main else ():
            if not shards.path(i, ".png").is_file() and (kept := shards.images(i)) is not None:
                shards.draw(i, kept)
    return [shards.path(i) for i in range(len(shards))]


def identity(source: Source, weights: str) -> dict[str, Any]:
    """What ``sample_to_shards`` compares: the step, which weights, and a digest of what distinguishes them."""
    digest = hashlib.sha256(checkpoints.to_json(source.identity).encode()).hexdigest()[:16]
    return {"step": source.step, "weights": weights, "model": digest}


# Between two images --------------------------------------------------------------------------------------------------


def _from_file(path: Path, shape: tuple[int, ...], levels: int) -> np.ndarray:
    """An image file as (C, H, W) whole numbers below ``levels``, which its 256 are rounded to."""
    image = read_image(path).transpose(2, 0, 1)
    if shape[0] == 1 and (image == image[:1]).all():
        image = image[:1]
    if image.shape != tuple(shape):
        wanted, found = ("x".join(map(str, s)) for s in (shape, image.shape))
        raise UserError(f"--interpolate {path}: the model's images are {wanted} (channels, height, width), got {found}")
    return np.round(image * ((levels - 1) / 255)).astype(np.uint8)


def _end(end: str, source: Source, model: DiffusionModel) -> tuple[np.ndarray, int | None]:
    """An image (C, H, W) and its label, where it has one: of a file, or of that number in the test split."""
    if not end.isdecimal():
        return _from_file(Path(end), model.shape, model.levels), None
    if source.data is None:
        raise UserError(f"{source.name} has no test split: --interpolate needs two image files, got {end}")
    dataset = load(source.data)
    images, labels = dataset.images["test"], dataset.labels
    if int(end) >= len(images):
        raise UserError(f"--interpolate must lie in 0 .. {len(images) - 1}, the numbers of the test split, got {end}")
    return images[int(end)], None if labels is None else int(labels["test"][int(end)])


def _latents(model: DiffusionModel, images: Tensor, labels: list[int | None], seed: int) -> Tensor | None:
    """c of each of the two, by q(c|x)."""
    if model.latent is None:
        return None
    given = None
    if isinstance(model.latent, Label):
        if None in labels:
            raise UserError("the model is conditioned on class labels, and image files have none: give test images")
        given = torch.tensor(labels, device=model.device)
    with torch.no_grad():
        draw = model.infer(model.reals(images), model.latent.noise(Draws(seed, [0, 1], 0, model.device)), given)
    assert draw is not None
    return draw.c


def interpolate_to_files(
    model: DiffusionModel, stem: Path, settings: Settings, between: Between, source: Source
) -> list[Path]:
    """STEM.npz and STEM.png, a row from one image to the other (samplers.py, equations 4 and 5); their paths."""
    settings = resolved(settings, model, source.name)
    ends, labels = zip(*(_end(end, source, model) for end in between.ends), strict=True)
    images, weights = torch.from_numpy(np.stack(ends)).to(model.device), torch.linspace(0, 1, between.points)
    try:
        pixels.check_images(images, model.shape, model.levels)
        c = _latents(model, images, list(labels), settings.seed)
        if settings.method == "ancestral":
            found = samplers.interpolate(
                model,
                images,
                weights,
                time=between.time,
                shared=between.shared_noise,
                c=c,
                seed=settings.seed,
                **settings.chain,
            )
        elif settings.method == "ddim":
            found = samplers.interpolate_latents(
                model, images, weights, c=c, steps=settings.steps, spacing=settings.spacing
            )
        else:
            found = samplers.interpolate_latents(model, images, weights, c=c, rtol=settings.rtol, atol=settings.atol)
    except (SolverError, ValueError) as error:
        raise UserError(f"--interpolate: {error}") from None
    return pictures.save_interpolation(stem, found.cpu().numpy(), weights.numpy(), np.stack(ends), model.levels)
