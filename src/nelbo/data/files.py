"""Images in files of the user's: ``.npy`` and ``.npz`` arrays, and folders of image files.

Arrays are uint8 and of one of these layouts, tried in this order:

    (N, H, W)       three axes
    (N, C, H, W)    the second axis is 1 or 3
    (N, H, W, C)    the last axis is 1 or 3
    (N, C, H, W)    the second axis is shorter than both that follow

An ``.npz`` holds ``images`` (and ``labels``), or ``train``, ``validation``, ``test`` (and ``train_labels``, ...), and
may hold ``levels``, 256 otherwise. An ``.npy`` is mapped into memory, not read.

A folder holds image files of one size, or sub-folders train, validation, test of them. Files are taken in the order of
their names; files that no image format claims, and hidden ones, are left out. If every image is grey in every pixel the
set has 1 channel, otherwise 3; levels are 256.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nelbo.data.dataset import SPLITS
from nelbo.data.prepared import Images, Piece, Plan
from nelbo.errors import UserError

__all__ = ["FILTERS", "Resize", "file_plan", "read_arrays", "read_folder", "read_image", "read_images"]

SHOWN = ("trajectory", "trajectory_t")  # what a file of samples holds beside them
FILTERS = ("box", "lanczos", "bicubic", "bilinear")
CHUNK = 1024  # image files a piece
ROWS = 50_000  # images of a .npy a piece


def read_images(source: str | Path) -> tuple[dict[str, np.ndarray], int | None]:
    """The images of a file or folder as they lie there: split -> (N, C, H, W), "train" alone where it names no splits;
    and its levels, None where that is not said."""
    path = Path(source).expanduser()
    if path.is_dir():
        return read_folder(path), None
    if path.suffix.lower() not in (".npy", ".npz") or not path.is_file():
        problem = "is neither" if path.exists() else "is not there"
        raise UserError(f"images must be a folder of image files, or a .npy or .npz file; {path} {problem}")
    images, _, levels = read_arrays(path)
    with path.open("rb") as file:
        loaded = np.load(file, allow_pickle=False)
        return images, levels if not isinstance(loaded, np.ndarray) and "levels" in loaded else None


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None, int]:
    """Images and labels by split, and levels, of a ``.npy`` or ``.npz`` file."""
    try:
        if path.suffix.lower() == ".npy":
            arrays = {"images": np.load(path, mmap_mode="r", allow_pickle=False)}
        else:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as loaded:
                arrays = {key: loaded[key] for key in loaded}
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


def read_folder(path: Path) -> dict[str, np.ndarray]:
    """Images by split of a folder of image files, grey where all of them are."""
    images = {split: _read_images(names) for split, names in _split_files(path).items()}
    if all((array == array[:, :1]).all() for array in images.values()):
        images = {split: array[:, :1] for split, array in images.items()}
    return {split: np.ascontiguousarray(array) for split, array in images.items()}


def _split_files(path: Path) -> dict[str, list[Path]]:
    """Image files by split."""
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
    return files


def _image_files(folder: Path) -> list[Path]:
    from PIL import Image

    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = [file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in suffixes]
    return sorted((file for file in files if not file.name.startswith(".")), key=lambda file: file.name)


def _read_images(files: Sequence[Path], resize: "Resize | None" = None) -> np.ndarray:
    """Files as RGB, (N, 3, H, W) uint8."""
    images = [read_image(file) for file in files]
    if resize is not None:
        images = [resize(image, str(file)) for file, image in zip(files, images, strict=True)]
    for file, image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            raise UserError(
                f"all images must have one size: {files[0]} has {images[0].shape[0]}x{images[0].shape[1]} (HxW), "
                f"{file} {image.shape[0]}x{image.shape[1]}"
            )
    return np.stack(images).transpose(0, 3, 1, 2)


def read_image(file: Path | BinaryIO, name: str | None = None) -> np.ndarray:
    """A file as RGB, (H, W, 3) uint8; ``name`` for messages."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"it must have 8 bits a channel, got pillow's mode {image.mode}")
            pixels = np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
        if pixels.shape[2] == 4 and pixels[..., 3].min() < 255:
            raise ValueError("it must be opaque, got transparent pixels")
    except Exception as error:  # every format raises its own
        raise UserError(f"cannot take the image {name or file}: {_line(error)}") from error
    return pixels[..., :3]


def _line(error: Exception) -> str:
    """What an exception says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


# Plans ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resize:
    """The square of ``crop`` pixels in the middle, or all; then the shorter side to ``size`` pixels by ``filter``, and
    the square in the middle."""

    size: int | None = None
    crop: int | None = None
    filter: str = "box"

    def __call__(self, image: np.ndarray, what: str) -> np.ndarray:
        """(H, W, 3) uint8 -> (S, S, 3)."""
        from PIL import Image

        if self.crop is not None:
            if min(image.shape[:2]) < self.crop:
                raise UserError(f"--crop {self.crop} needs images at least as large, {what} is {_size(image)}")
            image = _middle(image, self.crop)
        if self.size is not None:
            height, width = image.shape[:2]
            scale = self.size / min(height, width)
            shape = (max(self.size, round(width * scale)), max(self.size, round(height * scale)))
            resampled = Image.fromarray(image).resize(shape, Image.Resampling[self.filter.upper()])
            image = _middle(np.asarray(resampled), self.size)
        return np.ascontiguousarray(image)

    @property
    def words(self) -> str:
        """What was done, for the description."""
        crop = [f"the middle {self.crop}x{self.crop}"] if self.crop is not None else []
        size = (
            [f"the shorter side to {self.size} by pillow's {self.filter}, the middle"] if self.size is not None else []
        )
        return ", ".join(crop + size)


def _size(image: np.ndarray) -> str:
    return f"{image.shape[0]}x{image.shape[1]}"


def _middle(image: np.ndarray, size: int) -> np.ndarray:
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def file_plan(path: Path, resize: Resize | None = None) -> Plan:
    """The plan of a folder of image files, or of a ``.npy`` or ``.npz`` file."""
    if path.is_dir():
        pieces = tuple(
            Piece(split, f"{split} from {files[i].name}", partial(_chunk, tuple(files[i : i + CHUNK]), resize))
            for split, files in _split_files(path).items()
            for i in range(0, len(files), CHUNK)
        )
        origin = {"folder": str(path.resolve()), "resize": None if resize is None else resize.words}
        about = "image files" + (f", {resize.words}" if resize is not None else "")
        return Plan(path.resolve().name, pieces, 256, about, origin=origin, grey=True)
    if resize is not None:
        raise UserError(f"--size and --crop are for folders of image files, and {path} is none")
    if path.suffix.lower() not in (".npy", ".npz") or not path.is_file():
        problem = "is neither" if path.exists() else "is not there"
        raise UserError(f"data must be a name, a folder of image files, or a .npy or .npz file; {path} {problem}")
    images, _, levels = read_arrays(path)
    stat = path.stat()
    where: dict[str, object] = {"file": str(path.resolve()), "bytes": stat.st_size, "modified": stat.st_mtime_ns}
    pieces = tuple(
        Piece(split, f"{split} from {i}", partial(_rows, path, split, i, i + ROWS))
        for split, array in images.items()
        for i in range(0, len(array), ROWS if path.suffix.lower() == ".npy" else len(array))
    )
    return Plan(path.resolve().name, pieces, levels, "arrays", origin=where)


def _chunk(files: Sequence[Path], resize: Resize | None) -> Images:
    return _read_images(files, resize), None


def _rows(path: Path, split: str, start: int, stop: int) -> Images:
    images, labels, _ = read_arrays(path)
    if path.suffix.lower() == ".npy":
        return images[split][start:stop], None
    return images[split], None if labels is None else labels[split]
