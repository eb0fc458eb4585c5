"""A run folder as the report reads it: run.json, metrics.jsonl, evaluations and samples.

A long metrics.jsonl is streamed and put into bins, so that memory and the page stay bounded whatever its length.
"""

import json
import math
import shlex
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nelbo import checkpoints
from nelbo.errors import UserError

__all__ = ["Baseline", "Curves", "Estimate", "Evaluation", "Run", "Samples", "Thinned", "read_runs"]

MOST_BINS = 500  # of lines of training
MOST_MARKS = 300  # bins of evaluations
MOST_IMAGES = 64


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error, nan where unknown; bits/dim unless said otherwise."""

    mean: float
    error: float


@dataclass(frozen=True)
class Baseline:
    """A classical method on the same images."""

    name: str
    value: Estimate
    note: str


@dataclass(frozen=True)
class Evaluation:
    """One file of RUN/evaluations. ``per_image``: (index, bits/dim) of the .npz beside it, where there is one."""

    stem: str
    value: Estimate
    published: Estimate | None
    draws_error: float
    terms: dict[str, Estimate]
    images: int
    split_images: int
    data: tuple[str, str]
    split: str
    step: int
    checkpoint: str
    weights: str
    settings: dict[str, Any]
    by_time: tuple[np.ndarray, np.ndarray, np.ndarray] | None
    latent_use: dict[str, Any] | None
    baselines: list[Baseline]
    seconds: float
    per_image: tuple[np.ndarray, np.ndarray] | None
    is_bound: bool = True
    tolerance: Estimate | None = None
    progressive: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    """t, bits/dim received above t and rmse in grey levels (evaluation.progressive)."""

    @property
    def method(self) -> str:
        """vlb or ode."""
        return str(self.settings.get("method", "vlb"))


Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Bin:
    """Some rows that follow each other: how many, their sum, and those of the least and of the largest value."""

    count: int
    total: Numbers
    least: Numbers
    largest: Numbers

    def with_next(self, other: "Bin", value: int) -> "Bin":
        """This one and the next as one; ``value`` is the column that is compared, nan never least nor largest."""
        total = tuple([a + b for a, b in zip(self.total, other.total, strict=True)])
        a, b = self.least, other.least
        least = b if b[value] < a[value] or a[value] != a[value] else a
        a, b = self.largest, other.largest
        return Bin(self.count + other.count, total, least, b if b[value] > a[value] or a[value] != a[value] else a)


class Thinned:
    """A series of rows in equal bins, at most ``limit`` and a rest, however many rows come. Kept of each bin: the mean,
    and the rows that are least and largest in the column ``value``; and the first row and the last of all."""

    def __init__(self, columns: int, limit: int = MOST_BINS, value: int = -1) -> None:
        self.columns, self.limit, self.value = columns, limit, value
        self.width, self.count = 1, 0
        self.bins: list[Bin] = []
        self.rest: Bin | None = None
        self.first: Numbers = ()
        self.last: Numbers = ()

    def add(self, row: Numbers) -> None:
        """One row more; where the bins run out, neighbours are merged and bins are twice as wide."""
        self.first, self.last, self.count = self.first or row, row, self.count + 1
        new = Bin(1, row, row, row)
        self.rest = new if self.rest is None else self.rest.with_next(new, self.value)
        if self.rest.count < self.width:
            return
        self.bins.append(self.rest)
        self.rest = None
        if len(self.bins) >= self.limit:
            pairs = zip(self.bins[::2], self.bins[1::2], strict=True)
            self.bins, self.width = [a.with_next(b, self.value) for a, b in pairs], 2 * self.width

    def rows(self) -> np.ndarray:
        """Means, (bins, columns), the last bin possibly of fewer rows."""
        return np.array([[x / b.count for x in b.total] for b in self._all()]).reshape(-1, self.columns)

    def points(self) -> np.ndarray:
        """Rows as they came, (points, columns), by their first column: the first, of each bin the least and the
        largest, the last. At most 2 limit + 2; all there are while no bin holds two."""
        ends = (self.first, self.last) if self.count else ()
        kept = {row[0]: row for row in (*ends, *(row for b in self._all() for row in (b.least, b.largest)))}
        return np.array([kept[place] for place in sorted(kept)]).reshape(-1, self.columns)

    def _all(self) -> list[Bin]:
        return self.bins if self.rest is None else [*self.bins, self.rest]


@dataclass
class Curves:
    """metrics.jsonl. train: (bins, 4) of step, seconds, bits/dim, latent term in bits/dim, averaged in bins of
    ``train_bin`` lines; lines: (points, 4), the first and the last line and those of the least and the largest bits/dim
    in every bin. validation: (points, 4) of step, seconds, bits/dim and its standard error; of more than ``MOST_MARKS``
    those chosen in the same way, from bins of ``validation_bin``."""

    train: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    lines: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    validation: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    train_count: int = 0
    train_bin: int = 1
    validation_count: int = 0
    validation_bin: int = 1
    step: int = 0
    images: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Samples:
    """images (N, C, H, W) of ``count`` in the file; trajectory (S, K, C, H, W) and its times (S,), where recorded."""

    file: str
    count: int
    images: np.ndarray
    trajectory: np.ndarray | None
    times: np.ndarray | None


@dataclass
class Run:
    """A run folder. ``name`` is unique on the page, ``number`` chooses its colour."""

    path: Path
    name: str
    number: int
    info: dict[str, Any]
    curves: Curves
    evaluations: list[Evaluation]
    samples: Samples | None
    checkpoint: str

    @property
    def data(self) -> dict[str, Any]:
        """What run.json says about the images: name, version, shape, levels."""
        return self.info["data"]

    @property
    def data_name(self) -> tuple[str, str]:
        """Data set and version."""
        return self.data["name"], self.data["version"]

    @property
    def dimensions(self) -> int:
        """C H W."""
        return math.prod(self.data["shape"])

    @property
    def headline(self) -> Evaluation | None:
        """The variational bound that speaks for the run: its own data, test split, the checkpoint asked for, averaged
        weights, the T of training; then the most images, the most draws, the latest step.
        An ODE likelihood where there is none."""
        return self._best([e for e in self.evaluations if e.method == "vlb"]) or self.flow

    @property
    def flow(self) -> Evaluation | None:
        """The likelihood by the probability flow that speaks for the run, chosen in the same way."""
        return self._best([e for e in self.evaluations if e.method == "ode"])

    def _best(self, evaluations: list[Evaluation]) -> Evaluation | None:
        trained_steps = self.info["config"].get("objective", {}).get("steps", 0)

        def rank(e: Evaluation) -> tuple[Any, ...]:
            draws = e.settings.get("times_per_shift", 0) * e.settings.get("shifts", 0)
            draws += e.settings.get("samples", 0) * e.settings.get("replicates", 0)
            asked = self.checkpoint in (e.checkpoint, str(e.step))
            same_time = e.settings.get("steps", 0) == trained_steps
            own = e.data == self.data_name
            care = e.settings.get("least_steps", 1), -e.settings.get("rtol", 0.0)
            return own, e.split == "test", asked, e.weights == "ema", same_time, e.images, draws, care, e.step, e.stem

        return max(evaluations, key=rank, default=None)

    def command(self, verb: str, rest: str = "") -> str:
        """The shell command that runs a verb of nelbo on this run."""
        return f"nelbo {verb} {shlex.quote(str(self.path))} {rest}".strip()


def read_runs(paths: list[Path], checkpoint: str = "best") -> list[Run]:
    """Every run folder, in the order given; folders that are no runs raise UserError."""
    if not paths:
        raise UserError("a report needs at least one run folder")
    names = [path.resolve().name for path in paths]
    runs = []
    for number, path in enumerate(paths):
        name = names[number] if names.count(names[number]) == 1 else str(path)
        runs.append(_read_run(path, name, number, checkpoint))
    return runs


def _read_run(path: Path, name: str, number: int, checkpoint: str) -> Run:
    info, file = checkpoints.read_run(path), path / "run.json"
    for key, kind in (("preset", str), ("parameters", int), ("parameters_by_part", dict), ("versions", dict)):
        _entry(info, key, kind, file)
    _entry(info, "config.data.source", str, file)
    shape, levels = info["data"]["shape"], info["data"]["levels"]
    if not 2 <= levels <= 256:
        raise UserError(f"{file}: data.levels must lie in 2 .. 256, got {levels}")
    files = sorted((path / "evaluations").glob("[!.]*.json"))
    evaluations = [_evaluation(e) for e in files if not e.name.startswith("fid-")]
    curves, samples = _curves(path / "metrics.jsonl"), _samples(path / "samples", shape)
    return Run(path, name, number, info, curves, evaluations, samples, checkpoint)


def _json(file: Path) -> dict[str, Any]:
    values = checkpoints.read_json(file)
    if not isinstance(values, dict):
        raise UserError(f"{file} must hold a JSON object, got {type(values).__name__}")
    return values


def _entry(values: dict[str, Any], key: str, kind: type, where: Path | str) -> Any:
    """The entry at a dotted key, of the given type (float: a number; null becomes nan)."""
    value: Any = values
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise UserError(f"{where}: the field {key} is missing")
        value = value[part]
    if kind is float:
        if value is None:
            return math.nan
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, kind) and not isinstance(value, bool):
        return value
    raise UserError(f"{where}: {key} must be of type {kind.__name__}, got {value!r}")


def _estimate(values: dict[str, Any], key: str, where: Path | str) -> Estimate:
    return Estimate(_entry(values, f"{key}.mean", float, where), _entry(values, f"{key}.standard_error", float, where))


def _lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of every line; a last line that a killed process left unfinished is passed over."""
    broken = None
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if broken:
                    raise UserError(broken)
                place = f"{file}, line {number}"
                try:
                    values = json.loads(line)
                except ValueError as error:
                    broken = f"{place} cannot be read as JSON: {error}"
                    continue
                if not isinstance(values, dict):
                    raise UserError(f"{place} must hold a JSON object, got {values!r}")
                yield place, values
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def _curves(file: Path) -> Curves:
    curves, train, validation = Curves(), Thinned(4, value=2), Thinned(4, MOST_MARKS, value=2)
    if not file.exists():
        return curves
    seen = {"train": -1, "evaluation": -1}
    for place, values in _lines(file):
        kind = values.get("kind")
        if kind == "fid":
            continue
        if kind not in seen:
            raise UserError(f"{place}: kind must be train or evaluation, got {kind!r}")
        step, seconds = _entry(values, "step", int, place), _entry(values, "seconds", float, place)
        if step <= seen[kind]:  # written again after a restart from an earlier checkpoint: the same numbers
            continue
        seen[kind] = step
        if kind == "train":
            bits = _entry(values, "bits_per_dim", float, place)
            train.add((step, seconds, bits, _entry(values, "terms.latent", float, place)))
        else:
            value = _estimate(values, "bits_per_dim", place)
            validation.add((step, seconds, value.mean, value.error))
        if step >= curves.step:
            curves.step, curves.seconds = step, seconds
            curves.images = _entry(values, "images", int, place)
    curves.train, curves.lines, curves.validation = train.rows(), train.points(), validation.points()
    curves.train_count, curves.train_bin = train.count, train.width
    curves.validation_count, curves.validation_bin = validation.count, validation.width
    return curves


def _columns(
    values: dict[str, Any], name: str, keys: tuple[str, str, str], file: Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Three lists of one length, where there are any."""
    if values.get(name) is None:
        return None
    columns = [_entry(values, f"{name}.{key}", list, file) for key in keys]
    try:
        a, b, c = (np.array(column, dtype=float) for column in columns)
    except (TypeError, ValueError):
        raise UserError(f"{file}: {name} must hold lists of numbers") from None
    if not a.shape == b.shape == c.shape:
        raise UserError(f"{file}: {name} must hold three lists of one length, got {[len(c) for c in columns]}")
    return a, b, c


def _evaluation(file: Path) -> Evaluation:
    values = _json(file)
    terms = {name: _estimate(values, f"terms.{name}", file) for name in _entry(values, "terms", dict, file)}
    ode = _entry(values, "settings", dict, file).get("method") == "ode"
    for name in ("prior", "divergence", "latent") if ode else ("prior", "reconstruction", "diffusion", "latent"):
        if name not in terms:
            raise UserError(f"{file}: the field terms.{name} is missing")
    baselines = []
    for number, entry in enumerate(values.get("baselines") or []):
        where = f"{file}, baseline {number + 1}"
        if not isinstance(entry, dict):
            raise UserError(f"{where} must be a JSON object, got {entry!r}")
        value = Estimate(_entry(entry, "bits_per_dim", float, where), float(entry.get("standard_error") or math.nan))
        baselines.append(Baseline(_entry(entry, "name", str, where), value, str(entry.get("note") or "")))
    use = values.get("latent_use")
    return Evaluation(
        stem=file.stem,
        value=_estimate(values, "bits_per_dim", file),
        published=_estimate(values, "as_published", file) if values.get("as_published") else None,
        draws_error=_entry(values, "draws_error", float, file),
        terms=terms,
        images=_entry(values, "images", int, file),
        split_images=_entry(values, "images_in_split" if "images_in_split" in values else "images", int, file),
        data=(_entry(values, "data.name", str, file), _entry(values, "data.version", str, file)),
        split=_entry(values, "split", str, file),
        step=_entry(values, "checkpoint.step", int, file),
        checkpoint=_entry(values, "checkpoint.name", str, file),
        weights=_entry(values, "weights", str, file),
        settings=_entry(values, "settings", dict, file),
        by_time=_columns(values, "by_time", ("t", "mean", "standard_error"), file),
        progressive=_columns(values, "progressive", ("t", "rate", "rmse"), file),
        latent_use=use if isinstance(use, dict) and "chance" in use else None,
        baselines=baselines,
        seconds=_entry(values, "seconds", float, file),
        per_image=_per_image(file.with_suffix(".npz")),
        is_bound=bool(values.get("is_bound", True)),
        tolerance=_estimate(values, "tolerance", file) if values.get("tolerance") else None,
    )


def _arrays(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} cannot be read as .npz: {error}") from None


def _per_image(file: Path) -> tuple[np.ndarray, np.ndarray] | None:
    if not file.exists():
        return None
    arrays = _arrays(file)
    if not {"index", "bits_per_dim"} <= set(arrays) or arrays["index"].shape != arrays["bits_per_dim"].shape:
        raise UserError(f"{file} must hold index and bits_per_dim of one length, got {', '.join(sorted(arrays))}")
    return arrays["index"], arrays["bits_per_dim"]


def _samples(folder: Path, shape: list[int]) -> Samples | None:
    files = sorted(folder.glob("*.npz"), key=lambda f: (f.stat().st_mtime, f.name))
    if not files:
        return None
    file, arrays = files[-1], _arrays(files[-1])
    images, trajectory, times = (arrays.get(name) for name in ("images", "trajectory", "trajectory_t"))
    if images is None or images.dtype != np.uint8 or list(images.shape[1:]) != shape:
        raise UserError(f"{file}: images must be uint8 (N, {', '.join(map(str, shape))})")
    if trajectory is not None and (trajectory.dtype != np.uint8 or list(trajectory.shape[2:]) != shape):
        raise UserError(f"{file}: trajectory must be uint8 (S, K, {', '.join(map(str, shape))})")
    if trajectory is None or times is None or times.shape != trajectory.shape[:1]:
        times = None
    return Samples(file.name, len(images), images[:MOST_IMAGES], trajectory, times)
