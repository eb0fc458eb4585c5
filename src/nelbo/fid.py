"""``nelbo fid``: the Fréchet distance and the inception score of samples, against the statistics of a data set.

Samples are drawn now from a run (its averaged weights), or read from a file or folder; the reference is the *training*
split, as in the field's figures, unless another is named. Images are taken in a fixed random order, so that a folder
sorted by class does not put a class into every part of the inception score.

The sums of features, and the file in which those of the reference are kept, are feature_sums.py's.
"""

import contextlib
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nelbo import checkpoints, metrics, sampling
from nelbo.data import Dataset, load
from nelbo.data.dataset import SPLITS
from nelbo.data.files import read_images
from nelbo.data.loader import permutation
from nelbo.devices import versions
from nelbo.errors import UserError
from nelbo.extractors import Extractor, Features, as_extractor, load_extractor
from nelbo.feature_sums import Images, NotStatistics, measure, read_statistics, reference_statistics
from nelbo.group import ALONE, Group, join
from nelbo.metrics import Frechet, Moments
from nelbo.model import DiffusionModel
from nelbo.resolve import INDEX, Source, resolve
from nelbo.shards import Shards, is_shards, read_shards
from nelbo.sharing import is_shared

__all__ = [
    "Result",
    "Settings",
    "during_training",
    "evaluate",
]

FEATURES = 64  # images whose features are taken at once, unless a batch is given
FEW = 10_000  # images below which the bias is warned of
PUBLISHED = 50_000
ORDER_SEED = 20252  # of the order in which images are taken
SPLIT_NAMES = {"train": "training", "validation": "validation", "test": "test"}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """What is measured, against what, and with which features."""

    reference: str = "train"
    data: str | None = None
    statistics: Path | None = None
    count: int | None = None  # by default 10 000 of a run, all of a file or folder
    levels: int | None = None
    extractor: str = "inception"
    weights: Path | None = None
    feature_seed: int = 0
    splits: int = 10
    batch: int | None = None
    # of a run, as in sampling.Settings
    checkpoint: str = "best"
    run_weights: str = "ema"
    method: str = "ancestral"
    steps: int | None = None
    spacing: str = "even"
    eta: float = 0.0
    variance: str | None = None
    clip: bool = False
    rtol: float = 3e-4
    atol: float = 3e-4
    seed: int = 0
    precision: str = "float32"


DRAWING = ("method", "steps", "spacing", "eta", "variance", "clip", "rtol", "atol", "seed", "precision", "batch")
DRAWN = ("checkpoint", "run_weights", *(name for name in DRAWING if name != "batch"))


@dataclass(frozen=True)
class Result:
    """The figures, the record of them, and where it was written; ``floor``: about what a perfect model would score."""

    frechet: Frechet
    floor: float
    inception_score: tuple[float, float] | None
    record: dict[str, Any]
    path: Path | None


# Images --------------------------------------------------------------------------------------------------------------


def _how(settings: Settings) -> sampling.Settings:
    """The part of the settings that says how samples are drawn."""
    chosen = {name: getattr(settings, name) for name in DRAWING}
    return sampling.Settings(count=FEW if settings.count is None else settings.count, **chosen)


def _is_images(path: Path) -> bool:
    """Whether a verb's argument is a folder or a file of images, and not a model."""
    if path.is_dir():
        return not is_shared(path) and not any((path / name).exists() for name in ("run.json", *INDEX))
    return path.suffix.lower() in (".npz", ".npy")


def _home(path: Path) -> Path | None:
    """The run in whose samples/ a file lies."""
    above = path.resolve().parent
    return path.parent.parent if above.name == "samples" and (above.parent / "run.json").is_file() else None


def _read(path: Path, settings: Settings, reference_levels: int) -> Images:
    """All images of a file, a folder or its shards, or the first ``settings.count``."""
    if path.is_dir() and is_shards(path):
        splits, said = {"train": np.concatenate(list(read_shards(path)))}, Shards.read(path).meta["levels"]
    else:
        splits, said = read_images(path)
    if set(splits) != {"train"}:
        raise UserError(f"{path} must hold images without splits, got {', '.join(splits)}")
    images = splits["train"]
    levels = _levels(path, images, said, settings.levels, reference_levels)
    if settings.count is not None and settings.count > len(images):
        raise UserError(f"--count must be at most {len(images)}, the images of {path}, got {settings.count}")
    images = images[: settings.count]
    return Images(images, levels, f"{len(images)} images of {path}")


def _levels(path: Path, images: np.ndarray, said: int | None, asked: int | None, reference: int) -> int:
    """The levels of images: what the file says, what --levels says, or 256 where that is beyond doubt."""
    if said is not None and asked not in (None, said):
        raise UserError(f"{path} says that it has {said} levels, and --levels {asked}")
    levels, most = said or asked, int(images.max())
    if levels is None and most < reference < 256:
        raise UserError(
            f"{path} does not say how many levels it has: no value is above {most}, and the reference has {reference}; "
            f"give --levels {reference} or --levels 256"
        )
    levels = levels or 256
    if most >= levels:
        raise UserError(f"--levels must be above every value, got {levels} and a value of {most} in {path}")
    return levels


@dataclass(frozen=True, eq=False)
class Kept:
    """Statistics that the user gave as a file."""

    path: Path
    moments: Moments
    record: dict[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of the images."""
        return tuple(self.record["images"]["shape"][1:])

    @property
    def levels(self) -> int:
        """Of the images."""
        return int(self.record["images"]["levels"])


def _reference(settings: Settings, dataset: Dataset | None) -> Images | Kept:
    """The reference's images, or its statistics from a file."""
    if settings.reference in SPLITS:
        if dataset is None:
            raise UserError(f"--reference {settings.reference} needs --data NAME_OR_PATH, the data set")
        images = dataset.images[settings.reference]
        what = f"{len(images)} {SPLIT_NAMES[settings.reference]} images of {dataset.name} (version {dataset.version})"
        return Images(images, dataset.levels, what)
    path = Path(settings.reference).expanduser()
    if not path.exists():
        raise UserError(f"--reference must be one of {', '.join(SPLITS)} or a path, and {path} is not there")
    if path.suffix.lower() == ".npz" and path.is_file():
        with contextlib.suppress(NotStatistics):
            return Kept(path, *read_statistics(path))
    splits, said = read_images(path)
    if "train" not in splits:
        raise UserError(f"--reference {path} must hold images, or train among its splits; got {', '.join(splits)}")
    images = splits["train"]
    levels = _levels(path, images, said, None, dataset.levels if dataset else 256)
    return Images(images, levels, f"{len(images)} images of {path}")


# The verb ------------------------------------------------------------------------------------------------------------


def check(settings: Settings, drawn: bool) -> None:
    """UserError where a setting is out of range, or is of drawing where nothing is drawn."""
    for name, least in (("count", 2), ("splits", 1), ("batch", 1)):
        value = getattr(settings, name)
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}")
    if not 0 <= settings.feature_seed < 2**64:
        raise UserError(f"--feature-seed must lie in 0 .. 2^64 - 1, got {settings.feature_seed}")
    if settings.levels is not None and not 2 <= settings.levels <= 256:
        raise UserError(f"--levels must lie in 2 .. 256, got {settings.levels}")
    if settings.feature_seed != Settings.feature_seed and settings.extractor != "random":
        raise UserError(f"--feature-seed belongs to --extractor random, and the extractor is {settings.extractor}")
    if drawn and settings.levels is not None:
        raise UserError("--levels is for images of a file or folder: a run knows its own")
    if drawn:
        sampling.check(_how(settings))
    for name in () if drawn else DRAWN:
        if getattr(settings, name) != getattr(Settings, name):
            raise UserError(f"--{name.replace('_', '-')} is for samples drawn from a run, and these are read")


def warning(count: int, size: int, frechet: Frechet, floor: float) -> str | None:
    """What few samples do to the figure; None for ``FEW`` or more."""
    if count >= FEW:
        return None
    if math.isfinite(frechet.bias):
        known = f"this figure's bias is about {frechet.bias:.4g} (jackknife): infinitely many, {frechet.limit:.4g}"
    else:
        known = f"this figure's bias cannot be estimated below {metrics.ENOUGH} samples for each of {size} features"
    return (
        f"{count} samples: the distance of so few is too high, by about b/{count} with a b of the model's own. "
        f"A perfect model's {count} would score about {floor:.4g}; {known}. "
        f"Published figures use {PUBLISHED} samples"
    )


def _check_splits(splits: int, count: int) -> None:
    if splits > count:
        raise UserError(f"--splits must be at most {count}, the number of samples, got {splits}")


def evaluate(
    source: Path | str,
    settings: Settings,
    *,
    extractor: Extractor | Features | None = None,
    out: Path | None = None,
    device: Any = "cpu",
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> Result:
    """Samples of a run, or the images of a folder or file, against a reference; writes RUN/evaluations/fid-*.json, or
    ``out``, or nothing where images belong to no run.

    ``extractor``: an Extractor or any callable (``as_extractor``) instead of the settings' own. ``progress(name, done,
    total)`` is called as it runs; ``say`` gets lines for people. Processes that were launched together share the work
    (group.py): all get the result, and the first writes.
    """
    begun, path, group = time.perf_counter(), Path(source), join(device)
    drawn = not _is_images(path)
    check(settings, drawn)
    if out is not None and out.is_dir():
        raise UserError(f"--out needs a file, got the folder {out}")
    model_source = resolve(source, settings.checkpoint, settings.run_weights) if drawn else None
    if model_source is not None:
        group.agree(model_source.identity, f"weights of {source}")
    home = _home(path) if model_source is None else model_source.folder
    data = settings.data or _data(model_source, home)
    with group.first():  # which may have to prepare the images
        dataset = None if data is None else load(data)
    reference = _reference(settings, dataset)
    with group.first():  # which may have to fetch the weights
        extractor = as_extractor(
            extractor
            or load_extractor(
                settings.extractor,
                weights=settings.weights,
                seed=settings.feature_seed,
                channels=reference.shape[0],
                device=device,
            )
        )

    def seen(name: str, total: int) -> Callable[[int], None]:
        return lambda done: None if progress is None else progress(name, done, total)

    # What can be refused is, before anything takes long.
    levels = dataset.levels if dataset else reference.levels
    samples = None if model_source else _read(path, settings, levels)
    shape: tuple[int, ...] = samples.shape if samples else ()
    if model_source is not None:  # whose size may be open
        shape = tuple(
            size if own is None else own for own, size in zip(model_source.shape, reference.shape, strict=True)
        )
    _same_shape(path, shape, reference.shape)
    how = replace(_how(settings), count=len(samples.values)) if samples else _how(settings)
    count, name = how.count, f"{path.stem}-{how.count}"
    if count < 2:
        raise UserError(f"a distance needs at least 2 images, got {count} in {path}")
    _check_splits(settings.splits, count)
    model = None
    if model_source is not None:
        model = model_source.load(model_source.levels or levels, device, shape)
        how = sampling.resolved(how, model, model_source.name)
        name = sampling.name_of(how, model_source, settings.run_weights)
    moments, about = _statistics(reference, extractor, settings, home, seen, say, group)
    if samples is None:
        assert model is not None and model_source is not None
        step = "" if model_source.step is None else f", step {model_source.step}, {settings.run_weights} weights"
        steps = "" if how.steps is None else f", {how.steps} steps"
        what = f"{count} samples of {model_source.name}{step} ({how.method}{steps})"
        samples = Images(sampling.draw_all(model, how, seen("sampling", count), group=group), model.levels, what)
    shuffled = samples.values[permutation(count, ORDER_SEED)]
    sums, scores = measure(
        shuffled,
        samples.levels,
        extractor,
        parts=settings.splits,
        batch=settings.batch or FEATURES,
        progress=seen("features", count),
        group=group,
    )
    frechet, floor = metrics.jackknife(sums, moments), metrics.floor(count, moments)
    score = None if scores is None else metrics.score_parts(scores)
    said = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(settings).items() if drawn or k not in DRAWN}
    said |= {"count": count} | ({"steps": how.steps} if drawn else {})
    record = {
        "fid": frechet.value,
        "standard_error": frechet.standard_error,
        "bias": frechet.bias,
        "floor": floor,
        "inception_score": None if score is None else {"mean": score[0], "std": score[1], "splits": settings.splits},
        "images": count,
        "samples": {"what": samples.what, "sha256": samples.digest(), "levels": samples.levels, "drawn": drawn},
        "reference": {"name": settings.reference, **{k: about[k] for k in ("what", "images", "versions")}},
        "extractor": {
            "name": extractor.name,
            "identity": extractor.identity,
            "note": extractor.note,
            "features": moments.size,
        },
        "checkpoint": None if model_source is None else {"step": model_source.step, "name": settings.checkpoint},
        "settings": said,
        "warning": warning(count, moments.size, frechet, floor),
        "versions": {**versions(), **extractor.versions},
        "seconds": time.perf_counter() - begun,
    }
    where = out or (None if home is None else home / "evaluations" / f"{_name(settings, extractor, name)}.json")
    if group.main and where is not None:
        checkpoints.write_json(where, record)
    return Result(frechet, floor, score, record, where)


def _data(source: Source | None, home: Path | None) -> str | None:
    """The data set of a run, or of the run that samples are of."""
    if source is not None:
        return source.data
    return None if home is None else str(checkpoints.read_run(home)["config"]["data"]["source"])


def _same_shape(path: Path, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if tuple(found) != tuple(wanted):
        a, b = ("x".join(map(str, shape)) for shape in (found, wanted))
        raise UserError(f"{path} has images of {a} (CxHxW), and the reference of {b}: they must have one shape")


def _statistics(
    reference: Images | Kept,
    extractor: Extractor,
    settings: Settings,
    home: Path | None,
    seen: Callable[[str, int], Callable[[int], None]],
    say: Callable[[str], None],
    group: Group,
) -> tuple[Moments, dict[str, Any]]:
    """The reference's sums: read, or measured and kept."""
    if isinstance(reference, Kept):
        if settings.statistics is not None:
            raise UserError(f"--statistics names a file to keep them in, and --reference {reference.path} is one")
        made = reference.record["extractor"]["identity"]
        if extractor.identity is None or made != extractor.identity:
            raise UserError(
                f"{reference.path} holds statistics of the extractor {made}, and this one is "
                f"{extractor.identity or f'{extractor.name}, without an identity'}: figures of two do not compare"
            )
        return reference.moments, reference.record
    if len(reference.values) < 2:
        raise UserError(f"a reference needs at least 2 images, got {len(reference.values)}")
    own = settings.statistics is None
    cache = settings.statistics
    if own and home is not None:
        name = settings.reference if settings.reference in SPLITS else Path(settings.reference).name
        cache = home / "evaluations" / f".fid-{name}-{_label(extractor)}.npz"
    progress = seen("reference", len(reference.values))
    return reference_statistics(
        reference, extractor, cache, own=own, batch=settings.batch or FEATURES, say=say, progress=progress, group=group
    )


def _label(extractor: Extractor) -> str:
    """For file names: the name, with the start of the digest where many networks share it."""
    if extractor.name == "inception" or extractor.identity is None:
        return extractor.name
    return f"{extractor.name}-{hashlib.sha256(extractor.identity.encode()).hexdigest()[:8]}"


def _name(settings: Settings, extractor: Extractor, samples: str) -> str:
    """A file name that says what differs from one evaluation of a run to another."""
    reference = settings.reference if settings.reference in SPLITS else Path(settings.reference).name
    data = f"-{Path(settings.data).name}" if settings.data else ""
    return f"fid-{reference}{data}-{samples}-{_label(extractor)}"


# In training ---------------------------------------------------------------------------------------------------------


def during_training(
    model: DiffusionModel,
    data: Dataset,
    run: Path,
    extractor: Extractor | Features,
    *,
    count: int = 1000,
    split: str = "train",
    splits: int = 10,
    say: Callable[[str], None] = print,
    group: Group = ALONE,
    **drawing: Any,
) -> dict[str, Any]:
    """The figures of ``count`` samples of a model against a split, for a log: fid, floor, inception_score (mean and
    std, or None), samples, split, extractor.

    The split's statistics are kept in the run, in the file that ``nelbo fid RUN`` uses too. ``drawing``: Settings'
    method, steps, seed, batch and so on. With the same seed every call draws from the same noise, and figures of a run
    differ by what was learned. The global random state is left alone.
    """
    settings = Settings(reference=split, count=count, splits=splits, **drawing)
    check(settings, drawn=True)
    _check_splits(splits, count)
    extractor = as_extractor(extractor)
    reference = _reference(settings, data)
    assert isinstance(reference, Images)

    def seen(name: str, total: int) -> Callable[[int], None]:
        return lambda done: None

    moments, _ = _statistics(reference, extractor, settings, run, seen, say, group)
    how = sampling.resolved(_how(settings), model, str(run))
    images = sampling.draw_all(model, how, group=group)[permutation(count, ORDER_SEED)]
    sums, scores = measure(images, model.levels, extractor, parts=splits, batch=settings.batch or FEATURES, group=group)
    score = None if scores is None else metrics.score_parts(scores)
    return {
        "fid": metrics.frechet(metrics.merge(sums), moments),
        "floor": metrics.floor(count, moments),
        "inception_score": None if score is None else {"mean": score[0], "std": score[1]},
        "samples": count,
        "split": split,
        "extractor": extractor.name,
    }
