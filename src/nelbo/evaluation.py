"""Evaluation of a run on a data set: figures, files and the references that stand beside them.

A likelihood by ODE takes long: its draws are kept in a file of their own while it runs, and the same command goes on.
Of several processes (group.py) each keeps what it has solved, and the first writes the figures.
"""

import contextlib
import csv
import glob
import io
import math
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nelbo import checkpoints, likelihood
from nelbo.data import Dataset, baselines, load
from nelbo.devices import full_float32, versions
from nelbo.errors import UserError
from nelbo.flow import LEAST_STEPS
from nelbo.group import ALONE, Group, join
from nelbo.latent_use import latent_use
from nelbo.latents import Label
from nelbo.likelihood import BitsPerDim, Estimate
from nelbo.memory import most_rows
from nelbo.model import DiffusionModel, Reverse
from nelbo.resolve import Source, resolve

__all__ = ["Evaluation", "Settings", "evaluate", "per_image_csv", "time_bins"]


@dataclass(frozen=True)
class Settings:
    """What is evaluated, and how exactly."""

    method: str = "vlb"
    checkpoint: str = "best"
    weights: str = "ema"
    parameterization: str | None = None
    split: str = "test"
    data: str | None = None
    images: int | None = None
    seed: int = 0
    batch: int | None = None
    # vlb
    times: int = 16
    shifts: int = 2
    steps: int | None = None
    variance: str | None = None
    # both
    clip: bool | None = None
    # ode
    dequantization: str | None = None
    samples: int = 1
    replicates: int = 2
    trace: str = "rademacher"
    probes: int = 1
    rtol: float = 1e-3
    atol: float = 1e-3
    solver: str = "adams4"
    least_steps: int | None = None
    state: str = "float32"


VLB = ("times", "shifts", "steps", "variance")
ODE = ("dequantization", "samples", "replicates", "trace", "probes", "rtol", "atol", "solver", "least_steps", "state")
RESOLVED = 8  # images that are solved again, to say what the tolerance costs


@dataclass(frozen=True)
class Evaluation:
    """The result, what was written where, and a comparison where one was asked for."""

    result: BitsPerDim
    record: dict[str, Any]
    path: Path
    compared: BitsPerDim | None = None
    difference: Estimate | None = None


def _table(estimate: Estimate | None) -> dict[str, float] | None:
    return None if estimate is None else {"mean": estimate.mean, "standard_error": estimate.standard_error}


def time_bins(result: BitsPerDim, count: int = 20) -> dict[str, list[float]] | None:
    """The diffusion term in bits/dim by bins of t: the mean over images of an image's mean in the bin, and its
    standard error over images (the draws of one image are not independent). None without times."""
    if result.by_time is None:
        return None
    n = len(result.index)
    t, values = (column.reshape(n, -1) for column in result.by_time[:2])
    place = np.minimum((t * count).astype(int), count - 1)
    bins: dict[str, list[float]] = {"t": [], "mean": [], "standard_error": []}
    for i in range(count):
        inside = place == i
        drawn = inside.sum(1)
        means = np.where(inside, values, 0.0).sum(1)[drawn > 0] / drawn[drawn > 0]
        if len(means) > 1:
            bins["t"].append((i + 0.5) / count)
            bins["mean"].append(float(means.mean()))
            bins["standard_error"].append(float(means.std(ddof=1) / math.sqrt(len(means))))
    return bins


def progressive(result: BitsPerDim, levels: int, count: int = 50) -> dict[str, list[float]] | None:
    """Bits spent against error (DDPM section 4.3): what is known of an image once z_t is received, from t = 1 down.

    At the middles of ``count`` bins of t, latest first: ``rate``, the bits/dim of prior, latent and the diffusion term
    above t; ``rmse`` of x_hat(z_t) in grey levels. The last point has the whole rate; what is left to pay there is the
    reconstruction, the distortion in bits. None without times.
    """
    if result.by_time is None or not np.isfinite(result.by_time[2]).all():
        return None
    t, values, errors = result.by_time
    place = np.minimum((t * count).astype(int), count - 1)
    draws = np.bincount(place, minlength=count)
    if not draws.all():
        return None
    share = np.bincount(place, values, count) / len(t)  # each bin's part of the term
    start = sum(result.terms[name].mean for name in ("prior", "latent"))
    above = start + np.cumsum(share[::-1])
    rmse = np.sqrt(np.bincount(place, errors, count) / draws)[::-1] * levels / 2
    middle = (np.arange(count)[::-1] + 0.5) / count
    return {"t": middle.tolist(), "rate": (above - share[::-1] / 2).tolist(), "rmse": rmse.tolist()}


def per_image_csv(result: BitsPerDim) -> str:
    """One line an image: index, bits/dim, every term, and the standard error that its draws leave. Bits/dim."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(result.per_image_terms)
    writer.writerow(["index", "bits_per_dim", *names, "standard_error"])
    columns = [result.per_image, *(result.per_image_terms[n] for n in names), result.per_image_error]
    for index, *row in zip(result.index, *columns, strict=True):
        writer.writerow([int(index), *(f"{value:.9f}" for value in row)])
    return text.getvalue()


def _chosen(source: Source, settings: Settings) -> tuple[Dataset, np.ndarray, np.ndarray | None]:
    """The data set, and the images and labels to evaluate."""
    if settings.data is None and source.data is None:
        raise UserError(f"{source.name} does not say on which images it was trained: give --data NAME_OR_PATH")
    dataset = load(settings.data or source.data or "")
    if settings.split not in dataset.images:
        raise UserError(f"--split must be one of {', '.join(dataset.images)}, got {settings.split!r}")
    images = dataset.images[settings.split]
    labels = None if dataset.labels is None else dataset.labels[settings.split]
    if settings.images is not None:
        if not 1 <= settings.images <= len(images):
            raise UserError(f"--images must lie in 1 .. {len(images)} for this split, got {settings.images}")
        images, labels = images[: settings.images], None if labels is None else labels[: settings.images]
    return dataset, images, labels


def check(settings: Settings) -> None:
    """UserError where a setting is out of range, or belongs to the other method."""
    for name in ("times", "shifts", "batch", "samples", "replicates", "probes", "least_steps"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not 0 <= settings.seed < 2**64:
        raise UserError(f"--seed must lie in 0 .. 2^64 - 1, got {settings.seed}")
    if settings.steps is not None and settings.steps < 0:
        raise UserError(f"--steps must be 0 or more, got {settings.steps}")
    for name in ("rtol", "atol"):
        if not 0 < getattr(settings, name) < 1:
            raise UserError(f"--{name} must lie between 0 and 1, got {getattr(settings, name)}")
    if settings.trace == "exact" and settings.probes != 1:
        raise UserError(
            f"--probes are for --trace rademacher or gaussian: the exact trace has none, got {settings.probes}"
        )
    for name in ODE if settings.method == "vlb" else VLB:
        if getattr(settings, name) != getattr(Settings, name):
            other = "ode" if settings.method == "vlb" else "vlb"
            raise UserError(
                f"--{name.replace('_', '-')} belongs to --method {other}, and the method is {settings.method}"
            )


def _load_for(source: Source, settings: Settings, dataset: Dataset, device: Any) -> tuple[DiffusionModel, int]:
    """The model of a source, which must be of the data's shape, and the T of its bound."""
    name, levels = source.name, source.levels or dataset.levels
    fits = all(own in (None, size) for own, size in zip(source.shape, dataset.shape, strict=True))
    if not fits or levels != dataset.levels:
        own_shape = "x".join("any" if n is None else str(n) for n in source.shape)
        raise UserError(
            f"{name} models images of {own_shape} with {levels} levels; "
            f"{dataset.name} has {'x'.join(map(str, dataset.shape))} with {dataset.levels}"
        )
    model = source.load(levels, device, tuple(dataset.shape))
    steps = source.steps if settings.steps is None else settings.steps
    if settings.method == "ode":
        steps = 0
        if model.schedule_reads_image:
            raise UserError(f"the schedule of {name} reads the image: it has no probability flow; use --method vlb")
    if model.schedule_reads_image and not steps:
        raise UserError("a schedule that reads the image has a bound at finite T only: give --steps above 0")
    if isinstance(model.latent, Label):
        if dataset.labels is None:
            raise UserError(f"{name} is conditioned on class labels, and {dataset.name} has none")
        if dataset.classes > model.latent.size:
            raise UserError(f"{name} knows {model.latent.size} classes, and {dataset.name} has {dataset.classes}")
    model.reverse = _reverse(model, settings, steps, name)
    return model, steps


def _reverse(model: DiffusionModel, settings: Settings, steps: int, name: str) -> Reverse:
    """The reverse steps to be measured: the model's own, but for what was asked for."""
    reverse = model.reverse
    if settings.variance == "learned" and not model.learned_variance:
        raise UserError(f"--variance learned: the network of {name} has no output for it; it has {reverse.variance}")
    if settings.variance is not None and not steps:
        raise UserError("--variance belongs to the bound at finite T: in continuous time there is none; give --steps")
    if settings.clip is not None and not steps and reverse.decoder != "gaussian":
        raise UserError("--clip belongs to the bound at finite T, or to a gaussian decoder: neither is here")
    clip = reverse.clip if settings.clip is None else settings.clip
    return replace(reverse, variance=settings.variance or reverse.variance, clip=clip)


def _baselines(dataset: Dataset, folder: Path, split: str) -> list[dict[str, Any]]:
    """The classical references on the whole split; none where a data set is too small for them."""
    try:
        return [asdict(b) for b in baselines(dataset, split, folder / "evaluations" / ".baselines.json")]
    except UserError:
        return []


class Unfinished:
    """The draws of an evaluation that is under way, in a file of each process's own; ``key`` says of what they are."""

    def __init__(self, path: Path, key: dict[str, Any], group: Group) -> None:
        self.path, self.key, self.group = path, checkpoints.to_json(key), group
        self.own = path if group.main else path.with_suffix(f".{group.rank}{path.suffix}")

    def _files(self) -> list[Path]:
        return [self.path, *sorted(self.path.parent.glob(f"{glob.escape(self.path.stem)}.[0-9]*{self.path.suffix}"))]

    def read(self) -> dict[str, np.ndarray] | None:
        """The table of ``likelihood.ode`` with what processes of the same evaluation had solved; None for nothing."""
        found: dict[str, np.ndarray] | None = None
        for path in self._files():
            try:
                with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                    if str(arrays["key"]) != self.key:
                        continue
                    table = {name: arrays[name] for name in likelihood.DRAW}
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                continue  # none, or not readable: everything is solved again
            if found is None:
                found = table
            known = ~np.isnan(table["prior"])
            for name, values in found.items():
                values[known] = table[name][known]
        return found

    def write(self, table: dict[str, np.ndarray]) -> None:
        """Keep the table; whoever reads sees a whole one."""
        content = io.BytesIO()
        np.savez(content, key=np.array(self.key), **table)  # type: ignore[arg-type]
        checkpoints.write_aside(self.own, content.getvalue())

    def remove(self) -> None:
        """Nothing is under way any more."""
        for path in self._files():
            path.unlink(missing_ok=True)


def _by_ode(
    model: DiffusionModel,
    images: np.ndarray,
    labels: np.ndarray | None,
    settings: Settings,
    batch: int,
    unfinished: Unfinished | None = None,
    group: Group = ALONE,
    progress: Callable[[int, float], None] | None = None,
) -> BitsPerDim:
    table = None
    if unfinished is not None:  # one table, whatever another process begins to write
        table = group.tell(unfinished.read() if group.main else None)
    try:
        return likelihood.ode(
            model,
            images,
            labels=labels,
            dequantization=settings.dequantization or "truncated-normal",
            samples=settings.samples,
            replicates=settings.replicates,
            trace=settings.trace,
            probes=settings.probes,
            rtol=settings.rtol,
            atol=settings.atol,
            method=settings.solver,
            least_steps=settings.least_steps,
            double=settings.state == "float64",
            seed=settings.seed,
            batch=batch,
            table=table,
            save=None if unfinished is None else unfinished.write,
            group=group,
            progress=progress,
        )
    except (likelihood.SolverError, ValueError) as error:  # both say what to do instead
        raise UserError(str(error)) from None


def _tolerance(model: DiffusionModel, images: np.ndarray, labels: np.ndarray | None, settings: Settings) -> Estimate:
    """What the tolerance costs: the figure less that of tolerances ten times as tight, twice as many steps at least (or
    twice the default's) and a float64 state, the same first draws of the first images. Bits/dim."""
    n = min(RESOLVED, len(images))
    one = replace(settings, samples=1, replicates=1)
    least = 2 * max(settings.least_steps or 1, LEAST_STEPS.get(settings.solver, 1))
    tight = replace(one, rtol=settings.rtol / 10, atol=settings.atol / 10, least_steps=least, state="float64")
    few = images[:n], None if labels is None else labels[:n]
    with full_float32():
        loose_result, tight_result = (_by_ode(model, *few, s, n) for s in (one, tight))
    return likelihood.compare(loose_result, tight_result)


def _batch(model: DiffusionModel, settings: Settings, steps: int, group: Group) -> int:
    """Rows at once that fit into the memory of every process."""
    image = np.zeros((1, *model.shape), dtype=np.uint8)

    def work(rows: int) -> None:
        images, labels = np.repeat(image, rows, 0), np.zeros(rows, dtype=np.int64)
        if settings.method == "vlb":
            likelihood.vlb(model, images, labels=labels, times_per_shift=1, shifts=1, steps=steps, batch=rows)
            return
        loose = replace(settings, samples=1, replicates=1, rtol=0.9, atol=0.9, solver="bosh3", least_steps=1)
        with contextlib.suppress(UserError):  # the memory of a solve that fails is the same
            _by_ode(model, images, labels, loose, rows)

    most = 64 if settings.method == "ode" and model.device.type == "cpu" else None
    return min(group.ask(most_rows(work, model.device, most)))


def evaluate(
    run: Path | str,
    settings: Settings,
    *,
    compare: Path | str | None = None,
    out: Path | None = None,
    device: Any = "cpu",
    progress: Callable[[str, int, int, float], None] | None = None,
) -> Evaluation:
    """The bound of a run on a whole split, or its likelihood by ODE; writes RUN/evaluations/*.json and the per-image
    figures beside it.

    Processes that were launched together share the work (group.py): all get the result, and the first writes.
    ``run``: whatever ``resolve`` knows; ``out``, another folder than its own for what is written. ``compare``: another,
    evaluated on the same images with the same draws. ``progress(run, images done, images, bits/dim)`` is called at the
    start, with nan, and as it runs.
    """
    begun = time.perf_counter()
    check(settings)
    group = join(device)
    source = resolve(run, settings.checkpoint, settings.weights, out, settings.parameterization)
    group.agree(source.identity, f"weights of {run}")
    if settings.method == "ode" and settings.least_steps is None:
        settings = replace(settings, least_steps=LEAST_STEPS.get(settings.solver, 1))
    with group.first():  # which may have to prepare the images
        dataset, images, labels = _chosen(source, settings)
    model, steps = _load_for(source, settings, dataset, device)
    if settings.method == "ode" and settings.dequantization is None:
        own = "variational" if model.reverse.decoder == "gaussian" else "truncated-normal"
        settings = replace(settings, dequantization=own)
    other = None
    if compare is not None:
        other_source = resolve(compare, settings.checkpoint, settings.weights)
        group.agree(other_source.identity, f"weights of {compare}")
        other = _load_for(other_source, settings, dataset, device)
    if group.main:
        checkpoints.make_folder(source.folder / "evaluations")
    path = source.folder / "evaluations" / f"{_name(settings, steps, dataset)}.json"

    def figure(which: str, model: DiffusionModel, steps: int, unfinished: Unfinished | None) -> BitsPerDim:
        def seen(done: int, bits: float) -> None:
            if progress is not None:
                progress(which, done, len(images), bits)

        seen(0, math.nan)
        with full_float32():
            batch = settings.batch or _batch(model, settings, steps, group)
            if settings.method == "ode":
                return _by_ode(model, images, labels, settings, batch, unfinished, group, seen)
            return likelihood.vlb(
                model,
                images,
                labels=labels,
                times_per_shift=settings.times,
                shifts=settings.shifts,
                steps=steps,
                seed=settings.seed,
                batch=batch,
                group=group,
                progress=seen,
            )

    key = {
        "settings": {**asdict(settings), "batch": None},
        "checkpoint": source.identity,
        "versions": versions(),
        "data": [dataset.name, dataset.version, len(images)],
    }
    unfinished = Unfinished(path.with_name(f".{path.stem}.npz"), key, group)
    result = figure(str(run), model, steps, unfinished)
    compared = None if other is None else figure(str(compare), *other, None)
    difference = None if compared is None else likelihood.compare(result, compared)
    record: dict[str, Any] | None = None
    if group.main:
        tolerance = None
        if settings.method == "ode":
            with contextlib.suppress(UserError):  # a tighter solve may fail where this one did not: the figure stays
                tolerance = _table(_tolerance(model, images, labels, settings))
        record = {
            "bits_per_dim": _table(result.value),
            "is_bound": result.is_bound,
            "as_published": _table(result.as_published),
            "draws_error": result.draws_error,
            "terms": {name: _table(value) for name, value in result.terms.items()},
            "images": len(images),
            "images_in_split": len(dataset.images[settings.split]),
            "split": settings.split,
            "data": {"name": dataset.name, "version": dataset.version},
            "source": source.kind,
            "checkpoint": {"step": source.step, "name": settings.checkpoint},
            "weights": settings.weights,
            "settings": result.settings,
            "cost": result.cost,
            "tolerance": tolerance,
            "by_time": time_bins(result),
            "progressive": progressive(result, dataset.levels),
            "latent_use": latent_use(model, images, labels) if len(images) > 1 else None,
            "baselines": _baselines(dataset, source.folder, settings.split),
            "comparison": None
            if compared is None
            else {"run": str(compare), "bits_per_dim": _table(compared.value), "difference": _table(difference)},
            "versions": versions(),
            "seconds": time.perf_counter() - begun,
        }
        arrays = io.BytesIO()
        np.savez_compressed(
            arrays, index=result.index, bits_per_dim=result.per_image, standard_error=result.per_image_error
        )
        checkpoints.write_together(
            {path.with_suffix(".npz"): arrays.getvalue(), path: checkpoints.to_json(record, indent=2) + "\n"}
        )
        unfinished.remove()
    record = group.tell(record)
    assert record is not None
    return Evaluation(result, record, path, compared, difference)


def _name(settings: Settings, steps: int, dataset: Dataset) -> str:
    """A file name that says what differs from one evaluation of a run to another."""
    name = f"{settings.split}-{settings.checkpoint}-{settings.weights}-{settings.method}"
    if settings.method == "vlb":
        name += f"-{settings.times}x{settings.shifts}" + (f"-T{steps}" if steps else "")
        name += f"-{settings.variance}" if settings.variance is not None else ""
    else:
        name += f"-{settings.dequantization}-{settings.samples}x{settings.replicates}"
        name += f"-{settings.solver}-{settings.least_steps}-{settings.rtol:g}"
        for field in ("trace", "probes", "atol", "state"):
            if getattr(settings, field) != getattr(Settings, field):
                name += f"-{field}-{getattr(settings, field)}"
    name += "" if settings.clip is None else "-clip" if settings.clip else "-no-clip"
    name += f"-seed{settings.seed}" if settings.seed else ""
    name += f"-{settings.images}" if settings.images is not None else ""
    return name + (f"-{dataset.name}-{dataset.version}" if settings.data is not None else "")
