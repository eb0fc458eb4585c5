"""Image data sets by name or path: uint8 arrays (N, C, H, W) of values 0 .. levels - 1 in train, validation and test.

A source is the name of a data set, built in (digits, photos32) or official (nelbo.data.official); ``hub:OWNER/NAME``, a
data set of the hub with a column of images; a prepared folder (nelbo.data.prepared); or a ``.npy`` or ``.npz`` file or
a folder of image files (nelbo.data.files). A name wins over a file of that name.

Official and hub sets are prepared when they are first asked for, here in one process (``nelbo data`` takes all
cores), and mapped into memory from then on. Files and folders
are read as they are; large ones are better prepared once, by ``nelbo data PATH --out FOLDER``. Splits that a file or
folder does not bring are cut out of train, one tenth of it each (at least one image), by a fixed permutation: images
without splits become 80 % train, 10 % validation and 10 % test.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from nelbo.data.dataset import SPLIT_SEED, SPLITS, Dataset, content_hash, cut_rows
from nelbo.data.files import Resize, file_plan, read_arrays, read_folder
from nelbo.data.hub import PREFIX, hub_plan
from nelbo.data.loader import permutation
from nelbo.data.official import OFFICIAL, data_home, official_plan
from nelbo.data.prepared import Plan, is_prepared, open_prepared, prepare
from nelbo.errors import UserError

__all__ = ["SOURCES", "load", "named_folder", "photo_crops", "plan"]


def load(source: str) -> Dataset:
    """The data set of a source (see above). UserError where it is none, or its files are damaged."""
    if source in SOURCES:
        return SOURCES[source]()
    folder = named_folder(source)
    if folder is not None:
        # In this process: others would run the user's script again, unless it guards against that.
        return open_prepared(folder if is_prepared(folder) else prepare(plan(source), folder, workers=1))
    path = Path(source).expanduser()
    if path.is_dir() and is_prepared(path):
        return open_prepared(path)
    labels: dict[str, np.ndarray] | None
    if path.is_dir():
        images, labels, levels = read_folder(path), None, 256
    elif path.suffix.lower() in (".npy", ".npz") and path.is_file():
        images, labels, levels = read_arrays(path)
    else:
        problem = "is neither a .npy nor a .npz file" if path.exists() else "is not there"
        raise UserError(
            f"a data source must be one of {', '.join((*SOURCES, *OFFICIAL))}, or the path of a .npy or .npz file or "
            f"of a folder of image files; {source!r} {problem}"
        )
    if "train" not in images:
        raise UserError(
            f"{path} must hold images, or train and perhaps validation and test; got {', '.join(images) or 'none'}"
        )
    shapes = {split: array.shape[1:] for split, array in images.items()}
    for split, shape in shapes.items():
        if shape != shapes["train"]:
            raise UserError(
                f"all splits of {path} must have images of one shape (C, H, W), "
                f"got train {shapes['train']} and {split} {shape}"
            )
    images, labels = _cut(images, labels, path)
    counts = ", ".join(f"{len(images[split])} {split}" for split in SPLITS)
    channels, height, width = images["train"].shape[1:]
    name = path.resolve().name
    return Dataset(
        name=name,
        version=content_hash(images, levels),
        images=images,
        labels=labels,
        levels=levels,
        description=f"{name}: {counts} images of {channels}x{height}x{width}, {levels} levels",
    )


def named_folder(source: str) -> Path | None:
    """Where the prepared set of an official or hub name is, or will be; None for anything else."""
    if source in OFFICIAL:
        return data_home() / source
    if source.startswith(PREFIX):
        return data_home() / "hub" / re.sub(r"[^\w.-]+", "--", source.removeprefix(PREFIX).strip("/"))
    return None


def plan(
    source: str,
    files: Path | None = None,
    unofficial: bool = False,
    resize: Resize | None = None,
    show: Callable[[str, int, int], None] = lambda file, done, total: None,
) -> Plan:
    """What an official set, a set of the hub, a folder of image files or a file of arrays is prepared from.

    ``files``, ``unofficial`` and ``show`` as in ``official_plan``; ``resize`` where images are single files.
    """
    if source in OFFICIAL:
        if resize is not None:
            raise UserError(f"--size and --crop are for folders and sets of image files, and {source} has its own size")
        return official_plan(source, files, unofficial, show)
    if files is not None or unofficial:
        raise UserError(f"--files and --unofficial are for {', '.join(OFFICIAL)}, got {source}")
    if source.startswith(PREFIX):
        return hub_plan(source, resize)
    return file_plan(Path(source).expanduser(), resize)


def _cut(
    images: dict[str, np.ndarray], labels: dict[str, np.ndarray] | None, path: Path
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None]:
    """All three splits: those that are missing are cut out of train."""
    count = len(images["train"])
    tenth = max(1, count // 10)
    missing = [split for split in SPLITS if split not in images]
    if count <= tenth * len(missing):
        raise UserError(
            f"{path} must hold at least {len(missing) + 1} images to cut {' and '.join(missing)} out of "
            f"train, got {count}"
        )
    rows = cut_rows(count, dict.fromkeys(missing, tenth))

    def parts(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {split: arrays["train"][rows[split]] if split in rows else arrays[split] for split in SPLITS}

    return parts(images), parts(labels) if labels else None


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = bunch.images.astype(np.uint8)[:, None]
    order = permutation(len(images), SPLIT_SEED)
    parts = dict(zip(SPLITS, np.split(order, [1297, 1497]), strict=True))
    return Dataset(
        name="digits",
        version="1",
        images={split: images[rows] for split, rows in parts.items()},
        labels={split: bunch.target[rows].astype(np.int64) for split, rows in parts.items()},
        levels=17,
        description="digits: 1797 handwritten digits of scikit-learn, 1297 train, 200 validation, 300 test, "
        "images of 1x8x8, 17 levels, 10 classes",
    )


def _photos32() -> Dataset:
    from sklearn.datasets import load_sample_images

    return Dataset(
        name="photos32",
        version="1",
        images=photo_crops(load_sample_images().images),
        labels=None,
        levels=256,
        description="photos32: crops of the two sample photographs of scikit-learn from columns apart, 3600 train "
        "(overlapping), 104 validation, 104 test, images of 3x32x32, 256 levels",
    )


def photo_crops(photos: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Crops of 32x32 of photographs (427, 640, 3).

    Every 160 columns of a photograph are 96 for training, 32 for validation and 32 for testing. No pixel is in two
    splits, nor is any block in which JPEG coded it. The splits do share the two scenes: figures say how well a model
    knows these photographs, not photographs at large. Crops lie 8 pixels apart for training, 32 otherwise.
    """
    columns = {"train": range(0, 65, 8), "validation": range(96, 97), "test": range(128, 129)}
    crops = {}
    for split in SPLITS:
        step = 8 if split == "train" else 32
        crops[split] = np.stack(
            [
                photo[top : top + 32, left + column : left + column + 32].transpose(2, 0, 1)
                for photo in photos
                for left in range(0, 640, 160)
                for top in range(0, 427 - 32 + 1, step)
                for column in columns[split]
            ]
        )
    return crops


SOURCES: dict[str, Callable[[], Dataset]] = {"digits": _digits, "photos32": _photos32}
