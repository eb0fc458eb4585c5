"""Evaluation of a run on a data set: figures, files and the references that stand beside them."""

import csv
import io
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nelbo import checkpoints, likelihood
from nelbo.data import Dataset, baselines, load
from nelbo.errors import UserError
from nelbo.likelihood import BitsPerDim, Estimate

__all__ = ["Evaluation", "Settings", "evaluate", "per_image_csv", "time_bins"]


@dataclass(frozen=True)
class Settings:
    """What is evaluated, and how exactly."""

    checkpoint: str = "best"
    weights: str = "ema"
    split: str = "test"
    data: str | None = None
    images: int | None = None
    times: int = 16
    shifts: int = 2
    steps: int | None = None
    seed: int = 0
    batch: int = 256


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


def time_bins(result: BitsPerDim, count: int = 20) -> dict[str, list[float]]:
    """The diffusion term in bits/dim by bins of t: means over draws and their standard errors."""
    t, values = result.by_time
    place = np.minimum((t * count).astype(int), count - 1)
    bins: dict[str, list[float]] = {"t": [], "mean": [], "standard_error": []}
    for i in range(count):
        chosen = values[place == i]
        if len(chosen) > 1:
            bins["t"].append((i + 0.5) / count)
            bins["mean"].append(float(chosen.mean()))
            bins["standard_error"].append(float(chosen.std(ddof=1) / math.sqrt(len(chosen))))
    return bins


def per_image_csv(result: BitsPerDim) -> str:
    """One line an image: index, bits/dim, every term, and the standard error that its draws leave. Bits/dim."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(result.per_image_terms)
    writer.writerow(["index", "bits_per_dim", *names, "standard_error"])
    columns = [result.per_image, *(result.per_image_terms[n] for n in names), result.per_image_error]
    for index, *row in zip(result.index, *columns, strict=True):
        writer.writerow([int(index), *(f"{value:.6f}" for value in row)])
    return text.getvalue()


def _chosen(run: Path, settings: Settings) -> tuple[Dataset, np.ndarray, np.ndarray | None]:
    """The data set, and the images and labels to evaluate; they must be of the shape that the run was trained on."""
    data = checkpoints.read_run(run)["data"]
    source = settings.data or checkpoints.read_run(run)["config"]["data"]["source"]
    dataset = load(source)
    if settings.split not in dataset.images:
        raise UserError(f"--split must be one of {', '.join(dataset.images)}, got {settings.split!r}")
    if list(dataset.shape) != data["shape"] or dataset.levels != data["levels"]:
        raise UserError(
            f"{run} models images of {'x'.join(map(str, data['shape']))} with {data['levels']} levels; {dataset.name} has "
            f"{'x'.join(map(str, dataset.shape))} with {dataset.levels}"
        )
    images = dataset.images[settings.split]
    labels = None if dataset.labels is None else dataset.labels[settings.split]
    if settings.images is not None:
        if not 1 <= settings.images <= len(images):
            raise UserError(f"--images must lie in 1 .. {len(images)} for this split, got {settings.images}")
        images, labels = images[: settings.images], None if labels is None else labels[: settings.images]
    return dataset, images, labels


def evaluate(
    run: Path | str,
    settings: Settings,
    *,
    compare: Path | str | None = None,
    device: Any = "cpu",
    progress: Callable[[str, int, int, float], None] | None = None,
) -> Evaluation:
    """The bound of a run on a whole split; writes RUN/evaluations/*.json and the per-image figures beside it.

    ``compare``: another run, evaluated on the same images with the same draws. ``progress(run, images done, images,
    bits/dim)``.
    """
    run, begun = Path(run), time.perf_counter()
    for name in ("times", "shifts", "batch"):
        if getattr(settings, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(settings, name)}")
    if settings.seed < 0 or (settings.steps is not None and settings.steps < 0):
        raise UserError(f"--seed and --steps must be 0 or more, got {settings.seed} and {settings.steps}")
    dataset, images, labels = _chosen(run, settings)

    def bound(which: Path) -> BitsPerDim:
        record = checkpoints.read_run(which)
        if (record["data"]["shape"], record["data"]["levels"]) != (list(dataset.shape), dataset.levels):
            raise UserError(f"{which} models images of another shape or number of levels than {dataset.name}")
        model = checkpoints.load_model(which, settings.checkpoint, settings.weights, device)
        trained_steps = record["config"]["objective"]["steps"]
        steps = trained_steps if settings.steps is None else settings.steps
        if model.schedule_reads_image and not steps:
            raise UserError("a schedule that reads the image has a bound at finite T only: give --steps above 0")
        if labels is None and model.latent is not None and model.encoder is None:
            raise UserError(f"{which} is conditioned on class labels, and {dataset.name} has none")
        seen = None if progress is None else lambda done, bits: progress(str(which), done, len(images), bits)
        return likelihood.vlb(
            model,
            images,
            labels=labels,
            times_per_shift=settings.times,
            shifts=settings.shifts,
            steps=steps,
            seed=settings.seed,
            batch=settings.batch,
            progress=seen,
        )

    from nelbo.report import latent_use
    from nelbo.training import versions

    (run / "evaluations").mkdir(exist_ok=True)
    result = bound(run)
    compared = bound(Path(compare)) if compare is not None else None
    difference = likelihood.compare(result, compared) if compared is not None else None
    checkpoint = checkpoints.read_checkpoint(run, settings.checkpoint)
    model = checkpoints.load_model(run, settings.checkpoint, settings.weights, device)
    record = {
        "bits_per_dim": _table(result.value),
        "as_published": _table(result.as_published),
        "draws_error": result.draws_error,
        "terms": {name: _table(value) for name, value in result.terms.items()},
        "images": len(images),
        "split": settings.split,
        "data": {"name": dataset.name, "version": dataset.version},
        "checkpoint": {"step": checkpoint.step, "name": settings.checkpoint},
        "weights": settings.weights,
        "settings": result.settings,
        "by_time": time_bins(result),
        "latent_use": None if model.latent is None else latent_use(model, images, labels),
        "baselines": [
            {
                "name": b.name,
                "bits_per_dim": b.bits_per_dim,
                "standard_error": b.standard_error,
                "note": b.note,
            }
            for b in baselines(dataset, settings.split, run / "evaluations" / ".baselines.json")
        ],
        "comparison": None
        if compared is None
        else {"run": str(compare), "bits_per_dim": _table(compared.value), "difference": _table(difference)},
        "versions": versions(),
        "seconds": time.perf_counter() - begun,
    }
    s = result.settings
    name = f"{settings.split}-{settings.checkpoint}-{settings.weights}-vlb-{s['times_per_shift']}x{s['shifts']}"
    name += f"-T{s['steps']}" if s["steps"] else ""
    name += f"-seed{settings.seed}" if settings.seed else ""
    name += f"-{len(images)}" if settings.images is not None else ""
    name += f"-{dataset.version}" if settings.data is not None else ""
    path = run / "evaluations" / f"{name}.json"
    arrays = io.BytesIO()
    np.savez_compressed(arrays, index=result.index, bits_per_dim=result.per_image, standard_error=result.per_image_error)
    checkpoints.write_aside(path.with_suffix(".npz"), arrays.getvalue())
    checkpoints.write_json(path, record)
    return Evaluation(result, record, path, compared, difference)
