"""Data sets of the hub with a column of images, read by the library datasets: hub:OWNER/NAME or hub:OWNER/NAME:CONFIG.

Their train split is train and their test split test; without one, or where test has no labels and the others have,
their validation split is test, as papers use it. What is missing then is cut out of train.
"""

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nelbo.data.files import Resize, read_image
from nelbo.data.prepared import Images, Piece, Plan
from nelbo.errors import UserError

__all__ = ["PREFIX", "hub_plan"]

PREFIX = "hub:"
ROWS = 10_000  # images a piece
VALIDATION = ("validation", "valid", "val", "dev")


def hub_plan(source: str, resize: Resize | None = None) -> Plan:
    """The plan of hub:OWNER/NAME[:CONFIG], or of a local folder in its place; UserError where it has no images."""
    tables = _load(source)
    splits = {split: name for split, names in (("train", ("train",)), ("validation", VALIDATION), ("test", ("test",)))
              for name in names if name in tables}  # fmt: skip
    if "train" not in splits:
        raise UserError(f"{source} must have a split train, got {', '.join(tables) or 'none'}")
    image, label = _columns(source, tables[splits["train"]])
    if label is not None and "test" in splits and min(tables[splits["test"]].unique(label)) < 0:
        del splits["test"]  # the labels of a competition's test set are secret, and -1
    note = ""
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
        note = "; test is its validation set"
    pieces = tuple(
        Piece(
            split,
            f"{name} from {i} of {Path(file).name}",
            partial(_rows, source, file, i, i + ROWS, image, label, resize),
        )
        for split, name in splits.items()
        for file, count in _files(tables[name])
        for i in range(0, count, ROWS)
    )
    prints = {name: tables[name]._fingerprint for name in splits.values()}
    origin = {"hub": source, "fingerprints": prints, "resize": None if resize is None else resize.words}
    about = f"column {image!r} of the hub's {source.removeprefix(PREFIX)}{note}"
    about += f", {resize.words}" if resize is not None else ""
    return Plan(source, pieces, 256, about, origin=origin, grey=True)


def _load(source: str) -> Any:
    """The splits of a data set; fetched the first time, from the library's own cache afterwards."""
    name, _, config = source.removeprefix(PREFIX).partition(":")
    if not name:
        raise UserError("a data set of the hub is named hub:OWNER/NAME or hub:OWNER/NAME:CONFIG, got no name")
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{source} needs the library datasets: pip install 'nelbo[data]' ({error})") from None
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, config or None)
    except Exception as error:  # that library and the hub's raise what they like
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{source} cannot be had: {reason}; give the hub's OWNER/NAME (and :CONFIG where there are several)"
        ) from None


def _columns(source: str, table: Any) -> tuple[str, str | None]:
    """The one column of images, and that of classes where there is one."""
    import datasets

    images = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(images) != 1:
        raise UserError(
            f"{source} must have one column of images, got {', '.join(images) or 'none'} among "
            f"{', '.join(table.column_names)}"
        )
    return images[0], labels[0] if len(labels) == 1 else None


def _files(table: Any) -> Iterator[tuple[str, int]]:
    """The files in the library's cache that a split lies in, and how many rows each has."""
    import datasets

    for entry in table.cache_files:
        yield entry["filename"], len(datasets.Dataset.from_file(entry["filename"]))


def _rows(
    source: str, file: str, start: int, stop: int, image: str, label: str | None, resize: Resize | None
) -> Images:
    import datasets

    table = datasets.Dataset.from_file(file)
    table = table.select(range(start, min(stop, len(table)))).cast_column(image, datasets.Image(decode=False))
    images: list[np.ndarray] = []
    for i, row in enumerate(table):
        what = f"image {start + i} of {Path(file).name} of {source}"
        said = row[image]
        if said is None or (said["bytes"] is None and said["path"] is None):
            raise UserError(f"{what} is missing")
        content = said["bytes"] if said["bytes"] is not None else Path(said["path"]).read_bytes()
        pixels = read_image(io.BytesIO(content), what)
        pixels = resize(pixels, what) if resize is not None else pixels
        if images and pixels.shape != images[0].shape:
            raise UserError(
                f"all images of {source} must have one size: the first has {images[0].shape[0]}x{images[0].shape[1]}, "
                f"{what} {pixels.shape[0]}x{pixels.shape[1]}; --size makes them one"
            )
        images.append(pixels)
    labels = None if label is None else np.array(table[label], dtype=np.int64)
    return np.stack(images).transpose(0, 3, 1, 2), labels
