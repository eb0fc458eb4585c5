"""Image data sets: uint8 arrays (N, C, H, W) of values 0 .. levels - 1, split into train, validation and test.

A source is the name of a built-in data set, a ``.npy`` or ``.npz`` file, or a folder of image files. A name wins over a
file of that name. Splits that a file or folder does not bring are cut out of train, one tenth of it each (at least one
image), by a fixed permutation: images without splits become 80 % train, 10 % validation and 10 % test.

Arrays are uint8 and of one of these layouts, tried in this order:

    (N, H, W)       three axes
    (N, C, H, W)    the second axis is 1 or 3
    (N, H, W, C)    the last axis is 1 or 3
    (N, C, H, W)    the second axis is shorter than both that follow

An ``.npz`` holds ``images`` (and ``labels``), or ``train``, ``validation``, ``test`` (and ``train_labels``, ...), and
may hold ``levels``, 256 otherwise.

A folder holds image files of one size, or sub-folders train, validation, test of them. Files are taken in the order of
their names; files that no image format claims, and hidden ones, are left out. If every image is grey in every pixel the
set has 1 channel, otherwise 3; levels are 256.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nelbo.data.loader import permutation
from nelbo.errors import UserError

__all__ = ["SOURCES", "SPLITS", "Dataset", "load", "read_image", "read_images"]

SPLITS = ("train", "validation", "test")
SHOWN = ("trajectory", "trajectory_t")  # what a file of samples holds beside them
SPLIT_SEED = 20251


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images in three splits."""

    name: str
    version: str
    """A content hash for files, a fixed word for built-in sets: figures compare only where name and version agree."""
    images: dict[str, np.ndarray]  # split -> (N, C, H, W) uint8
    labels: dict[str, np.ndarray] | None  # split -> (N,) int64
    levels: int
    description: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.images["train"].shape[1:]
        return channels, height, width

    @property
    def classes(self) -> int:
        """The number of classes: one more than the largest label; 0 without labels."""
        return 0 if self.labels is None else 1 + max(int(labels.max()) for labels in self.labels.values())


def load(source: str) -> Dataset:
    """The data set of a built-in name, a ``.npy`` or ``.npz`` file, or a folder of image files."""
    if source in SOURCES:
        return SOURCES[source]()
    path = Path(source).expanduser()
    labels: dict[str, np.ndarray] | None
    if path.is_dir():
        images, labels, levels = _folder(path), None, 256
    elif path.suffix.lower() in (".npy", ".npz") and path.is_file():
        images, labels, levels = _arrays(path)
    else:
        problem = "is neither a .npy nor a .npz file" if path.exists() else "is not there"
        raise UserError(
            f"a data source must be one of {', '.join(SOURCES)}, or the path of a .npy or .npz file or of a folder "
            f"of image files; {source!r} {problem}"
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
        version=_hash(images, levels),
        images=images,
        labels=labels,
        levels=levels,
        description=f"{name}: {counts} images of {channels}x{height}x{width}, {levels} levels",
    )


def read_images(source: str | Path) -> tuple[dict[str, np.ndarray], int | None]:
    """The images of a file or folder as they lie there: split -> (N, C, H, W), "train" alone where it names no splits;
    and its levels, None where that is not said."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path), None
    if path.suffix.lower() not in (".npy", ".npz") or not path.is_file():
        problem = "is neither" if path.exists() else "is not there"
        raise UserError(f"images must be a folder of image files, or a .npy or .npz file; {path} {problem}")
    images, _, levels = _arrays(path)
    with path.open("rb") as file:
        loaded = np.load(file, allow_pickle=False)
        return images, levels if not isinstance(loaded, np.ndarray) and "levels" in loaded else None


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


def _arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None, int]:
    """Images and labels by split, and levels, of a ``.npy`` or ``.npz`` file."""
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            arrays = {"images": loaded} if isinstance(loaded, np.ndarray) else {key: loaded[key] for key in loaded}
    except Exception as error:  # numpy, zipfile and zlib each raise their own
        raise UserError(
            f"cannot read {path}: it must hold plain arrays as numpy.save or numpy.savez writes them, not cut short "
            f"and without pickled objects ({_line(error)})"
        ) from error
    keys = {"train": "images"} if "images" in arrays else {split: split for split in SPLITS}
    label_keys = {split: "labels" if key == "images" else f"{key}_labels" for split, key in keys.items()}
    choices = [*keys.values(), *label_keys.values(), "levels"]
    unknown = [key for key in arrays if key not in (*choices, *SHOWN)]
    if unknown:
        raise UserError(f"unknown array {unknown[0]} in {path}; the choices are {', '.join(choices)}")
    levels = _levels(arrays.get("levels", np.array(256)), path)
    images = {split: _layout(arrays[key], f"{key} of {path}") for split, key in keys.items() if key in arrays}
    for split, values in images.items():
        if values.max() >= levels:
            raise UserError(f"{keys[split]} of {path} must lie below levels = {levels}, got {values.max()}")
    labels = {split: _labels(arrays[key], f"{key} of {path}") for split, key in label_keys.items() if key in arrays}
    for split in (*images, *labels) if labels else ():
        count, labelled = len(images.get(split, ())), len(labels.get(split, ()))
        if count != labelled:
            raise UserError(
                f"labels of {path} must be as many as the images, got {labelled} {label_keys[split]} for "
                f"{count} {keys[split]}"
            )
    return images, labels or None, levels


def _levels(value: np.ndarray, path: Path) -> int:
    if value.shape != () or value.dtype.kind not in "iu":
        raise UserError(f"levels of {path} must be one whole number, got {value.dtype} of shape {value.shape}")
    if not 2 <= value <= 256:
        raise UserError(f"levels of {path} must lie from 2 to 256, got {value}")
    return int(value)


def _labels(values: np.ndarray, what: str) -> np.ndarray:
    if values.dtype.kind not in "iu" or values.ndim != 1:
        raise UserError(f"{what} must be whole numbers (N,), got {values.dtype} of shape {values.shape}")
    if (values < 0).any():
        raise UserError(f"{what} must be 0 or more, got {values.min()}")
    return values.astype(np.int64)


def _layout(values: np.ndarray, what: str) -> np.ndarray:
    """The array as (N, C, H, W), by the rules in this module's docstring."""
    if values.dtype != np.uint8:
        raise UserError(f"{what} must be of type uint8, got {values.dtype}")
    if values.ndim not in (3, 4):
        raise UserError(f"{what} must be (N, H, W), (N, H, W, C) or (N, C, H, W), got shape {values.shape}")
    if not values.size:
        raise UserError(f"{what} must hold at least 1 image of at least 1 pixel, got shape {values.shape}")
    if values.ndim == 3:
        return values[:, None]
    if values.shape[1] in (1, 3):
        return values
    if values.shape[3] in (1, 3):
        return np.ascontiguousarray(values.transpose(0, 3, 1, 2))
    if values.shape[1] < min(values.shape[2:]):
        return values
    raise UserError(
        f"{what} must be (N, H, W, C) with C = 1 or 3, or (N, C, H, W) with C = 1, 3 or below H and W; "
        f"got shape {values.shape}"
    )


def _folder(path: Path) -> dict[str, np.ndarray]:
    """Images by split of a folder of image files."""
    folders = sorted(item.name for item in path.iterdir() if item.is_dir() and not item.name.startswith("."))
    files = {split: _image_files(path / split) for split in SPLITS if split in folders}
    loose = _image_files(path)
    strays = [name for name in folders if name not in SPLITS] + [file.name for file in loose]
    if files and strays:
        raise UserError(
            f"{path} must hold either image files or the sub-folders {', '.join(SPLITS)}, "
            f"got {strays[0]} beside {', '.join(files)}"
        )
    files = files or {"train": loose}
    for split, names in files.items():
        if not names:
            where = path / split if split in folders else path
            raise UserError(
                f"a folder must hold image files, or sub-folders {', '.join(SPLITS)} of them, got none in {where}"
            )
    images = {split: _read_images(names) for split, names in files.items()}
    if all((array == array[..., :1]).all() for array in images.values()):
        images = {split: array[..., :1] for split, array in images.items()}
    return {split: np.ascontiguousarray(array.transpose(0, 3, 1, 2)) for split, array in images.items()}


def _image_files(folder: Path) -> list[Path]:
    from PIL import Image

    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = [file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in suffixes]
    return sorted((file for file in files if not file.name.startswith(".")), key=lambda file: file.name)


def _read_images(files: list[Path]) -> np.ndarray:
    """Files as RGB, (N, H, W, 3) uint8."""
    images = [read_image(file) for file in files]
    for file, image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            raise UserError(
                f"all images must have one size: {files[0]} has {images[0].shape[0]}x{images[0].shape[1]} (HxW), "
                f"{file} {image.shape[0]}x{image.shape[1]}"
            )
    return np.stack(images)


def read_image(file: Path) -> np.ndarray:
    """A file as RGB, (H, W, 3) uint8."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"it must have 8 bits a channel, got pillow's mode {image.mode}")
            pixels = np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
        if pixels.shape[2] == 4 and pixels[..., 3].min() < 255:
            raise ValueError("it must be opaque, got transparent pixels")
    except Exception as error:  # every format raises its own
        raise UserError(f"cannot take the image {file}: {_line(error)}") from error
    return pixels[..., :3]


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
    order = permutation(count, SPLIT_SEED)
    pieces = np.split(order, [tenth * (i + 1) for i in range(len(missing))])
    rows = {split: np.sort(piece) for split, piece in zip((*missing, "train"), pieces, strict=True)}

    def parts(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {split: arrays["train"][rows[split]] if split in rows else arrays[split] for split in SPLITS}

    return parts(images), parts(labels) if labels else None


def _hash(images: dict[str, np.ndarray], levels: int) -> str:
    digest = hashlib.sha256(str(levels).encode())
    for split in SPLITS:
        digest.update(str(images[split].shape).encode())
        digest.update(np.ascontiguousarray(images[split]).data)
    return digest.hexdigest()[:12]


def _line(error: Exception) -> str:
    """What an exception says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


SOURCES: dict[str, Callable[[], Dataset]] = {"digits": _digits, "photos32": _photos32}
