"""The archives that official data sets come in, as pieces of a plan (nelbo.data.prepared).

    cifar10        pickled batches or binary ones: rows of 3072 values, red, green, blue planes; label first or beside
    imagenet, new  pickled batches or .npz: 'data' (N, 3 S S), the three planes; 'labels' from 1 to 1000
    imagenet, old  a tar of PNG files; or TensorFlow's records, each an Example whose feature 'image' is a PNG file
    fashion-mnist  idx files of images and of labels

Nothing here unpickles: nelbo.data.pickles reads the arrays and strings that a pickle holds. A tar is not unpacked.
"""

import io
import os
import re
import tarfile
import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nelbo.data.files import read_image
from nelbo.data.prepared import Images, Piece
from nelbo.errors import UserError

__all__ = ["cifar", "fashion", "imagenet_batches", "imagenet_pictures"]

BLOCK = 512  # of a tar
PICTURES = 20_000  # PNG files a piece
DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
)


def _damaged(path: Path, error: BaseException) -> UserError:
    return UserError(f"{path} is cut short or damaged: {' '.join(str(error).split()) or type(error).__name__}")


# Fashion-MNIST -------------------------------------------------------------------------------------------------------


def fashion(kit: str, paths: list[Path]) -> tuple[Piece, ...]:
    """Images and labels of train, then those of test."""
    return tuple(
        Piece(split, images.name, partial(_idx, images, labels))
        for split, images, labels in (("train", paths[0], paths[1]), ("test", paths[2], paths[3]))
    )


def _idx(images: Path, labels: Path) -> Images:
    from nelbo.data.idx import read_idx

    pixels, classes = read_idx(images), read_idx(labels)
    if pixels.ndim != 3 or classes.ndim != 1 or len(pixels) != len(classes):
        raise UserError(
            f"{images} and {labels} must hold as many images as labels, got {pixels.shape} and {classes.shape}"
        )
    return pixels[:, None], classes.astype(np.int64)


# CIFAR-10 ------------------------------------------------------------------------------------------------------------

CIFAR = [*((f"data_batch_{i}", "train") for i in range(1, 6)), ("test_batch", "test")]


def cifar(kit: str, paths: list[Path]) -> tuple[Piece, ...]:
    """Five batches of train and one of test, in one archive or lying beside one another."""
    read, suffix = (_cifar_binary, ".bin") if kit.startswith("binary") else (_cifar_python, "")
    whole = len(paths) == 1
    return tuple(
        Piece(split, f"{name}{suffix}", partial(read, paths[0] if whole else paths[i], f"{name}{suffix}", whole))
        for i, (name, split) in enumerate(CIFAR)
    )


def _member(path: Path, name: str, whole: bool) -> bytes:
    """A file that lies there, or that of its name in an archive .tar.gz."""
    try:
        if not whole:
            return path.read_bytes()
        with tarfile.open(path, "r|gz") as archive:
            for entry in archive:
                if entry.isreg() and entry.name.rsplit("/", 1)[-1] == name:
                    file = archive.extractfile(entry)
                    assert file is not None
                    content = file.read()
                    if len(content) == entry.size:
                        return content
                    raise EOFError(f"{name} ends early")
    except DAMAGE as error:
        raise _damaged(path, error) from None
    raise UserError(f"{path} holds no {name}")


def _entry(table: Any, name: str, what: str) -> Any:
    """An entry of a table whose keys Python 2 wrote as bytes, Python 3 as text."""
    for key in (name, name.encode()):
        if isinstance(table, dict) and key in table:
            return table[key]
    raise UserError(f"{what} holds no {name!r}")


def _cifar_python(path: Path, name: str, whole: bool) -> Images:
    from nelbo.data.pickles import read_pickle

    what = f"{name} of {path}" if whole else str(path)
    table = read_pickle(_member(path, name, whole), what)
    label = _entry(table, "batch_label", what)
    label = label.decode("latin1") if isinstance(label, bytes) else label
    number = re.fullmatch(r"data_batch_(\d)", name)
    expected = f"training batch {number[1]} of 5" if number else "testing batch 1 of 1"
    if label != expected:
        raise UserError(f"{what} must be {expected!r}, got {label!r}: another batch's content")
    return _rows(_entry(table, "data", what), 32, what), _classes(_entry(table, "labels", what), 0, what)


def _cifar_binary(path: Path, name: str, whole: bool) -> Images:
    what, content = f"{name} of {path}" if whole else str(path), _member(path, name, whole)
    if not content or len(content) % 3073:
        raise UserError(f"{what} must hold rows of 3073 bytes, got {len(content)} bytes: cut short or another format")
    rows = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    return _rows(rows[:, 1:], 32, what), _classes(rows[:, 0], 0, what)


def _rows(values: Any, size: int, what: str) -> np.ndarray:
    """(N, 3 S S) uint8 as (N, 3, S, S)."""
    if not isinstance(values, np.ndarray) or values.dtype != np.uint8 or values.shape[1:] != (3 * size * size,):
        got = f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else type(values).__name__
        raise UserError(f"the data of {what} must be uint8 (N, {3 * size * size}), got {got}")
    return np.ascontiguousarray(values).reshape(-1, 3, size, size)


def _classes(values: Any, first: int, what: str) -> np.ndarray:
    """Labels that count from ``first``, from 0."""
    try:
        classes = np.asarray(values)
    except ValueError:
        classes = np.empty(0)
    if classes.dtype.kind not in "iu" or classes.ndim != 1 or not classes.size or classes.min() < first:
        raise UserError(f"the labels of {what} must be whole numbers from {first} on, one an image")
    return classes.astype(np.int64) - first


# ImageNet, new: batches ----------------------------------------------------------------------------------------------


def imagenet_batches(size: int, kit: str, paths: list[Path]) -> tuple[Piece, ...]:
    """Ten batches of train and val_data, pickled or .npz, in zips or lying beside one another."""
    pieces = []
    for path in paths:
        if path.suffix != ".zip":
            names = [path.name]
        else:
            try:
                with zipfile.ZipFile(path) as archive:
                    names = [n for n in archive.namelist() if re.search(r"(train_data_batch_\d+|val_data)(\.npz)?$", n)]
            except DAMAGE as error:
                raise _damaged(path, error) from None
        for name in sorted(names, key=lambda n: [int(d) for d in re.findall(r"\d+", n.rsplit("/", 1)[-1])]):
            split = "test" if "val_data" in name else "train"
            pieces.append(Piece(split, name.rsplit("/", 1)[-1], partial(_imagenet_batch, path, name, size)))
    return tuple(pieces)


def _imagenet_batch(path: Path, name: str, size: int) -> Images:
    from nelbo.data.pickles import read_pickle

    what = f"{name} of {path}" if path.suffix == ".zip" else str(path)
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                content = archive.read(name)
        else:
            content = path.read_bytes()
        if name.endswith(".npz"):
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                table: Any = {key: arrays[key] for key in ("data", "labels")}
    except DAMAGE as error:
        raise _damaged(path, error) from None
    if not name.endswith(".npz"):
        table = read_pickle(content, what)
    return _rows(_entry(table, "data", what), size, what), _classes(_entry(table, "labels", what), 1, what)


# ImageNet, old: pictures ---------------------------------------------------------------------------------------------


def imagenet_pictures(size: int, kit: str, paths: list[Path]) -> tuple[Piece, ...]:
    """PNG files of a tar, some thousands a piece, or of TensorFlow's records, a file a piece."""
    pieces: list[Piece] = []
    for path in paths:
        split = "train" if "train" in path.name else "test"
        if path.suffix != ".tar":
            pieces.append(Piece(split, path.name, partial(_records, path, size)))
            continue
        members = tar_members(path)
        for start in range(0, len(members), PICTURES):
            part = members[start : start + PICTURES]
            pieces.append(Piece(split, f"{path.name} from {start}", partial(_pictures, path, part, size)))
    return tuple(pieces)


def _picture(content: bytes, size: int, what: str) -> np.ndarray:
    """A PNG file as (3, S, S) uint8."""
    pixels = read_image(io.BytesIO(content), what)
    if pixels.shape != (size, size, 3):
        raise UserError(f"{what} must be {size}x{size}, got {pixels.shape[0]}x{pixels.shape[1]}")
    return pixels.transpose(2, 0, 1)


def _pictures(path: Path, members: np.ndarray, size: int) -> Images:
    images = np.empty((len(members), 3, size, size), np.uint8)
    with open(path, "rb") as file:
        for i, (offset, length) in enumerate(members.tolist()):
            content = os.pread(file.fileno(), length, offset)
            images[i] = _picture(content, size, f"the picture at byte {offset} of {path}")
    return images, None


def _records(path: Path, size: int) -> Images:
    from nelbo.data.tfrecords import read_example, read_records

    images = []
    for i, record in enumerate(read_records(path)):
        what = f"record {i} of {path}"
        feature = read_example(record, what).get("image")
        if not feature or len(feature) != 1 or not isinstance(feature[0], bytes):
            raise UserError(f"{what} must hold one 'image', a PNG file")
        images.append(_picture(feature[0], size, what))
    if not images:
        raise UserError(f"{path} holds no records")
    return np.stack(images), None


def tar_members(path: Path) -> np.ndarray:
    """Offset and size of every file in a tar, (N, 2) int64, in its order, from the headers alone: a million of them in
    seconds and 16 MB. UserError where a header's checksum is wrong or the tar ends early."""
    found: list[tuple[int, int]] = []
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size
        place = 0
        while place < end:
            header = os.pread(file.fileno(), BLOCK, place)
            if header == bytes(BLOCK):
                break
            try:
                said, size = _octal(header[148:156]), _octal(header[124:136])
                right = said == sum(header) - sum(header[148:156]) + 8 * ord(" ")
            except ValueError:
                right = False
            if len(header) < BLOCK or not right:
                raise UserError(f"{path} is cut short or damaged: no header of a tar at byte {place}")
            place += BLOCK
            if place + size > end:
                raise UserError(
                    f"{path} is cut short: a file of {size} bytes begins at byte {place}, and it ends at {end}"
                )
            if header[156:157] in (b"0", b"\0"):
                found.append((place, size))
            elif header[156:157] != b"5":
                raise UserError(
                    f"{path} must hold plain files and folders, got type {header[156:157]!r} at byte {place}"
                )
            place += -(-size // BLOCK) * BLOCK
        else:
            raise UserError(f"{path} is cut short: it ends without the empty block that ends a tar")
    if not found:
        raise UserError(f"{path} holds no files")
    return np.array(found, dtype=np.int64)


def _octal(field: bytes) -> int:
    return int(field.rstrip(b" \0").lstrip(b" ") or b"0", 8)
