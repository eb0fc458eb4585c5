r"""Classical references in bits per dimension: what a model has to beat, measured on the same images.

    (1)  histogram   -1/D sum_d log2 p_d(v_d),    p_d(v) = (n_d(v) + a)/(N + a L)       exact
    (2)  mixture     -1/D E_u log2 p(v + u),      u uniform in [0, 1)^D                 an upper bound, by Jensen
    (3)  files       8 bytes/D                                                          the length of a real code

D = C H W; n_d counts the N training images; L is the number of levels. Bins have width 1, so that (2) needs no
constant: p(v) is the integral of the density over v + [0, 1)^D, and E_u log2 p(v + u) <= log2 p(v).
"""

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from nelbo.data.dataset import Dataset
from nelbo.data.loader import permutation
from nelbo.errors import UserError

__all__ = ["Baseline", "baselines", "gaussian_mixture", "histogram", "image_file", "image_files"]

REVISION = 1  # of the methods below: raise it when a figure changes, and cached ones are measured again
ALPHAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
COMPONENTS = 8
FULL = 256  # the most dimensions for which covariances are full
REGULARIZERS = (0.03, 0.1, 0.3, 1.0)  # variance added to every dimension, in squared levels
TRAIN_LIMIT = 10_000  # training images of the mixture
DRAWS = 8  # of u for each image whose figure is reported
SEED = 0
CHUNK = 1024  # images counted at once
SHEET = 4096  # pixels along a side of a sheet, at most
# format -> options of pillow's; a picture is coded with each of them and its shortest file counts
FORMATS: dict[str, tuple[dict[str, Any], ...]] = {
    "PNG": ({"optimize": True},),
    "WebP": tuple({"lossless": True, "quality": 100, "method": method, "exact": True} for method in (3, 6)),
}


@dataclass(frozen=True)
class Baseline:
    """One reference figure."""

    name: str
    bits_per_dim: float
    standard_error: float | None  # over images; None where images share one file
    note: str


def baselines(dataset: Dataset, split: str = "test", cache: str | os.PathLike[str] | None = None) -> list[Baseline]:
    """All references on a split. ``cache`` is a JSON file that keeps the figures of (name, version, split)."""
    if split not in dataset.images:
        raise UserError(f"the split must be one of {', '.join(dataset.images)}, got {split!r}")
    key = f"{dataset.name} {dataset.version} {split} {REVISION}"
    cached = _read(Path(cache)) if cache is not None else {}
    if key in cached:
        return [Baseline(**values) for values in cached[key]]
    found = [histogram(dataset, split), gaussian_mixture(dataset, split)]
    found += [file for kind in FORMATS for file in image_files(dataset, split, kind)]
    if cache is not None:
        cached[key] = [dataclasses.asdict(baseline) for baseline in found]
        _write(Path(cache), cached)
    return found


def histogram(dataset: Dataset, split: str = "test") -> Baseline:
    """Equation (1), the a of the grid that is best on validation."""
    train, levels = _flat(dataset.images["train"]), dataset.levels
    place = np.arange(train.shape[1])
    flat = np.zeros(len(place) * levels, dtype=np.int64)
    for start in range(0, len(train), CHUNK):  # images in their order: those of a mapped file are read once
        flat += np.bincount((place * levels + train[start : start + CHUNK]).ravel(), minlength=len(flat))
    counts = flat.reshape(-1, levels)  # (D, L)

    def bits(split: str, alpha: float) -> np.ndarray:
        values = _flat(dataset.images[split])
        codes = np.log2(len(train) + alpha * levels) - np.log2(counts + alpha)
        return np.array([codes[place, row].mean() for row in values])

    alpha = min(ALPHAS, key=lambda alpha: bits("validation", alpha).mean())
    note = f"independent pixels, {alpha} added to every count (chosen on validation): exact"
    return _over_images("pixel histogram", bits(split, alpha), note)


def gaussian_mixture(dataset: Dataset, split: str = "test") -> Baseline:
    """Equation (2), the regularizer of the grid that is best on validation."""
    from sklearn.mixture import GaussianMixture

    rng = np.random.default_rng(SEED)

    def dequantize(images: np.ndarray) -> np.ndarray:
        values = _flat(images)
        return values + rng.random(values.shape)

    images = dataset.images["train"]
    train = dequantize(images[permutation(len(images), SEED)[:TRAIN_LIMIT]])
    validation = dequantize(dataset.images["validation"])
    if len(train) < 2:
        raise UserError(f"baselines need at least 2 training images, got {len(train)}")
    components = min(COMPONENTS, len(train))
    kind = "full" if train.shape[1] <= FULL else "diag"
    fits = [
        GaussianMixture(components, covariance_type=kind, reg_covar=value, max_iter=500, random_state=SEED).fit(train)
        for value in REGULARIZERS
    ]
    best = max(fits, key=lambda fit: float(fit.score(validation)))
    densities = [best.score_samples(dequantize(dataset.images[split])) for _ in range(DRAWS)]  # nats
    note = (
        f"{components} components, {'full' if kind == 'full' else 'diagonal'} covariance, {best.reg_covar} added to "
        f"variances (chosen on validation), {len(train)} training images, uniform dequantisation, {DRAWS} draws an "
        "image: an upper bound"
    )
    return _over_images("Gaussian mixture", -np.mean(densities, axis=0) / (train.shape[1] * math.log(2)), note)


def image_files(dataset: Dataset, split: str, kind: str) -> list[Baseline]:
    """Equation (3) for a format of FORMATS: one file an image, and all images as tiles of a sheet."""
    images = dataset.images[split]
    dimensions = math.prod(dataset.shape)
    alone = np.array([8 * len(image_file(_picture(image), kind)) / dimensions for image in images])
    height, width = _picture(images[0]).shape[:2]
    most = max(1, SHEET // height) * max(1, SHEET // width)
    sheets = [_sheet(images[i : i + most]) for i in range(0, len(images), most)]
    together = sum(8 * len(image_file(sheet, kind)) for sheet in sheets) / images.size
    code = f"{kind}, lossless, strongest settings, 8 bits a channel, no palette"
    number = "one file" if len(sheets) == 1 else f"{len(sheets)} files"
    return [
        _over_images(f"{kind} per image", alone, f"{code}, a file an image, headers included: a code length"),
        Baseline(
            f"{kind} sheet",
            together,
            None,
            f"{code}, {len(images)} images tiled in {number}, which spreads the header and uses what images share: "
            "a code length",
        ),
    ]


def image_file(picture: np.ndarray, kind: str) -> bytes:
    """The shortest file of a picture, (H, W) or (H, W, 3) uint8, in a format of FORMATS."""
    from PIL import Image

    files = []
    for options in FORMATS[kind]:
        file = BytesIO()
        Image.fromarray(picture).save(file, kind, **options)
        files.append(file.getvalue())
    return min(files, key=len)


def _picture(image: np.ndarray) -> np.ndarray:
    """An image (3, H, W) as (H, W, 3); one of other channels as (C H, W), its channels below one another."""
    if len(image) == 3:
        return np.ascontiguousarray(image.transpose(1, 2, 0))
    return image.reshape(-1, image.shape[-1])


def _sheet(images: np.ndarray) -> np.ndarray:
    """Images as one picture, about square, in rows; the last row is filled up with 0."""
    pictures = [_picture(image) for image in images]
    height, width, *colours = pictures[0].shape
    columns = math.ceil(math.sqrt(len(pictures) * height / width))
    rows = math.ceil(len(pictures) / columns)
    sheet = np.zeros((rows * height, columns * width, *colours), dtype=np.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // columns * height, i % columns * width
        sheet[top : top + height, left : left + width] = picture
    return sheet


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1)


def _over_images(name: str, bits: np.ndarray, note: str) -> Baseline:
    """The mean of (N,) and its standard error."""
    error = float(bits.std(ddof=1) / math.sqrt(len(bits))) if len(bits) > 1 else None
    return Baseline(name, float(bits.mean()), error, note)


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The cache: key -> figures. A file that is none is left alone, for it may be something else of the user's."""
    if not path.exists():
        return {}
    try:
        cached: dict[str, list[dict[str, Any]]] = json.loads(path.read_text())
        for figures in cached.values():
            for values in figures:
                Baseline(**values)
    except (AttributeError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{path} must be a cache of baselines or not be there; delete it or name another") from error
    return cached


def _write(path: Path, cached: dict[str, list[dict[str, Any]]]) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(cached, indent=1))
    os.replace(part, path)
