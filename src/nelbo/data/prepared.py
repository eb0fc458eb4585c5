"""Prepared data sets: one .npy file a split, mapped into memory, so that any number of processes share one copy.

    FOLDER/dataset.json                    name, version, levels, where it came from; size and SHA-256 of each file
    FOLDER/train.npy, ...                  (N, C, H, W) uint8
    FOLDER/train-labels.npy, ...           (N,) int64, where there are labels

A plan is a list of pieces, each a function that reads some images of one split. Preparing runs them, several at once in
processes of their own, and keeps each piece's images in FOLDER.part; then it writes the splits from them, one piece in
memory at a time, and gives the folder its name. A process that is killed leaves its finished pieces, with which the
same plan goes on. Validation and test images that the source does not name are cut out of train by a fixed permutation.
"""

import hashlib
import json
import mmap
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from nelbo import checkpoints
from nelbo.data.dataset import SPLITS, Dataset, content_hash, cut_rows
from nelbo.errors import UserError

__all__ = ["Piece", "Plan", "is_prepared", "mapped", "open_prepared", "prepare", "verify"]

FORMAT = 1
FILE = "dataset.json"
Images = tuple[np.ndarray, np.ndarray | None]  # (N, C, H, W) uint8, and labels (N,) int64 where there are some


@dataclass(frozen=True)
class Piece:
    """Some images of a split; ``read`` is called in another process, so it must be a partial of a module's function."""

    split: str
    name: str
    read: Callable[[], Images]


@dataclass(frozen=True)
class Plan:
    """What a data set is made of.

    ``counts``: images that each of the source's splits must have, and ``shape``: theirs, (C, H, W), where they are
    known; ``cut``: images that become a split which the source has not, or None for a tenth of train each; ``about``:
    what it is, in words; ``origin``: files and checksums, for the record; ``grey``: keep one channel where all images
    are grey in every pixel.
    """

    name: str
    pieces: tuple[Piece, ...]
    levels: int
    about: str
    counts: Mapping[str, int] = field(default_factory=dict)
    shape: tuple[int, int, int] | None = None
    cut: Mapping[str, int] | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)
    grey: bool = False


# Preparing -----------------------------------------------------------------------------------------------------------


def prepare(
    plan: Plan, out: Path, workers: int | None = None, show: Callable[[int, int], None] = lambda done, total: None
) -> Path:
    """The prepared folder ``out``, made or completed; ``show(pieces done, pieces in all)``.

    UserError where the source is damaged or not what the plan says, or ``out`` holds something else.
    """
    if is_prepared(out):
        shutil.rmtree(out.with_name(f"{out.name}.part"), ignore_errors=True)
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} holds something else; a data set needs a new or empty folder")
    part = out.with_name(f"{out.name}.part")
    checkpoints.make_folder(part)
    with checkpoints.locked(part, "preparing"):
        _begin(plan, part)
        _read_pieces(plan, part, workers, show)
        try:
            _finish(plan, part)
            shutil.rmtree(part / "pieces")
            (part / "plan.json").unlink()
            if out.exists():
                out.rmdir()
            os.replace(part, out)
        except OSError as error:
            raise checkpoints.cannot_write(error, out) from error
    return out


def _begin(plan: Plan, part: Path) -> None:
    """Keep the pieces that are there if they are of this plan."""
    said = {"name": plan.name, "origin": plan.origin, "pieces": [[p.split, p.name] for p in plan.pieces]}
    said = json.loads(json.dumps(said))
    path = part / "plan.json"
    if path.is_file() and checkpoints.read_json(path) == said:
        for left in part.glob("pieces/.*"):
            left.unlink()
        return
    shutil.rmtree(part / "pieces", ignore_errors=True)
    checkpoints.make_folder(part / "pieces")
    checkpoints.write_json(path, said)


def _path(part: Path, number: int, labels: bool = False) -> Path:
    return part / "pieces" / f"{number:06d}{'-labels' if labels else ''}.npy"


def _read_pieces(plan: Plan, part: Path, workers: int | None, show: Callable[[int, int], None]) -> None:
    """Those that are missing, ``workers`` at once; by default as many as there are cores."""
    missing = [i for i in range(len(plan.pieces)) if not _path(part, i).is_file()]
    total = len(plan.pieces)
    done = total - len(missing)
    show(done, total)
    workers = min(workers or os.cpu_count() or 1, len(missing))
    if workers <= 1:
        for i in missing:
            _keep(plan.pieces[i], part, i)
            done += 1
            show(done, total)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(_keep, plan.pieces[i], part, i) for i in missing]):
                future.result()
                done += 1
                show(done, total)
        except BrokenProcessPool:
            raise UserError(
                f"a process that read {plan.name} was ended by the system, perhaps for want of memory; finished pieces "
                "are kept: the same command goes on, with --workers 1 in one process"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _keep(piece: Piece, part: Path, number: int) -> None:
    """Read a piece and write its files, the images last: with them it is complete."""
    images, labels = piece.read()
    if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        raise UserError(f"{piece.name} must hold images (N, C, H, W) of type uint8, got {images.dtype} {images.shape}")
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu" or labels.min() < 0):
        raise UserError(f"{piece.name} must hold one label, 0 or more, an image, got {labels.dtype} {labels.shape}")
    for values, path in ((labels, _path(part, number, labels=True)), (images, _path(part, number))):
        if values is None:
            continue
        aside = path.with_name(f".{path.name}")
        try:
            _save(aside, values.shape, [values if values.dtype == np.uint8 else values.astype(np.int64)])
            os.replace(aside, path)
        except OSError as error:
            raise checkpoints.cannot_write(error, path) from error


def _save(path: Path, shape: tuple[int, ...], chunks: Iterable[np.ndarray]) -> None:
    """A .npy file of the shape whose rows the chunks hold.

    Not by numpy: on a full disk its save leaves a file cut short and says nothing, and writing to a map ends the
    process.
    """
    with open(path, "wb") as file:
        for i, chunk in enumerate(chunks):
            if i == 0:
                kind = np.lib.format.dtype_to_descr(chunk.dtype)
                header = {"descr": kind, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(chunk).data)
        file.flush()
        os.fsync(file.fileno())


def _finish(plan: Plan, part: Path) -> None:
    """Splits and dataset.json from the pieces."""
    arrays = [np.load(_path(part, i), mmap_mode="r", allow_pickle=False) for i in range(len(plan.pieces))]
    sources: dict[str, list[int]] = {}
    for i, piece in enumerate(plan.pieces):
        sources.setdefault(piece.split, []).append(i)
        if arrays[i].shape[1:] != arrays[0].shape[1:]:
            raise UserError(
                f"all images of {plan.name} must have one shape (C, H, W): {plan.pieces[0].name} has "
                f"{arrays[0].shape[1:]}, {piece.name} {arrays[i].shape[1:]}"
            )
    if plan.shape not in (None, arrays[0].shape[1:]):
        raise UserError(f"images of {plan.name} must be (C, H, W) = {plan.shape}, got {arrays[0].shape[1:]}")
    labelled = {_path(part, i, labels=True).is_file() for i in range(len(arrays))}
    if len(labelled) > 1:
        raise UserError(f"either all or none of the pieces of {plan.name} must have labels")
    for split, count in plan.counts.items():
        found = sum(len(arrays[i]) for i in sources.get(split, ()))
        if found != count:
            raise UserError(f"{plan.name} must have {count} {split} images, got {found}")
    count = sum(len(arrays[i]) for i in sources["train"])
    missing = [split for split in SPLITS if split not in sources]
    sizes = {split: max(1, count // 10) if plan.cut is None else plan.cut[split] for split in missing}
    if count <= sum(sizes.values()):
        raise UserError(
            f"{plan.name} must hold more than {sum(sizes.values())} images to cut {' and '.join(missing)} out of "
            f"train, got {count}"
        )
    rows = cut_rows(count, sizes)
    grey = plan.grey and all(bool((a == a[:, :1]).all()) for a in _chunks(arrays))
    files: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        pieces = sources["train"] if split in rows else sources[split]
        for kind in ("", "-labels") if True in labelled else ("",):
            parts = [np.load(_path(part, i, labels=bool(kind)), mmap_mode="r", allow_pickle=False) for i in pieces]
            path = part / f"{split}{kind}.npy"
            _write(path, parts, rows.get(split), grey and not kind)
            files[path.name] = _digest(path)
    _describe(plan, part, files)


def _chunks(arrays: list[np.ndarray], size: int = 4096) -> Iterator[np.ndarray]:
    for array in arrays:
        for start in range(0, len(array), size):
            yield array[start : start + size]


def _write(path: Path, parts: list[np.ndarray], rows: np.ndarray | None, grey: bool) -> None:
    """One array of all parts, or of those rows of them, 4096 rows in memory at a time."""

    def chunks() -> Iterator[np.ndarray]:
        first = 0
        for part in parts:
            for start in range(0, len(part), 4096):
                chunk = part[start : start + 4096]
                if rows is not None:
                    low, high = np.searchsorted(rows, (first + start, first + start + len(chunk)))
                    chunk = chunk[rows[low:high] - first - start]
                yield chunk[:, :1] if grey else chunk
            first += len(part)

    total, shape = sum(map(len, parts)) if rows is None else len(rows), list(parts[0].shape[1:])
    _save(path, (total, 1, *shape[1:]) if grey else (total, *shape), chunks())


def _digest(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _describe(plan: Plan, part: Path, files: dict[str, dict[str, Any]]) -> None:
    """dataset.json, written last."""
    from nelbo.devices import versions

    images = {split: np.load(part / f"{split}.npy", mmap_mode="r", allow_pickle=False) for split in SPLITS}
    for split in SPLITS:
        top = max(int(chunk.max()) for chunk in _chunks([images[split]]))
        if top >= plan.levels:
            raise UserError(f"{split} images of {plan.name} must lie below levels = {plan.levels}, got {top}")
    channels, height, width = images["train"].shape[1:]
    counts = ", ".join(f"{len(images[split])} {split}" for split in SPLITS)
    record = {
        "format": FORMAT,
        "name": plan.name,
        "version": content_hash(images, plan.levels),
        "levels": plan.levels,
        "description": f"{plan.name}: {plan.about}; {counts} images of {channels}x{height}x{width}, "
        f"{plan.levels} levels",
        "origin": plan.origin,
        "files": files,
        "prepared": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }
    checkpoints.write_json(part / FILE, record)


# Reading -------------------------------------------------------------------------------------------------------------


def is_prepared(folder: Path) -> bool:
    """Whether a folder is a prepared data set."""
    return (folder / FILE).is_file()


def read_record(folder: Path) -> dict[str, Any]:
    """dataset.json; UserError where it was changed, or files are missing or of another size."""
    path = folder / FILE
    record = checkpoints.read_json(path)
    kinds = {"name": str, "version": str, "levels": int, "description": str, "files": dict}
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{path} has format {found!r}; this version of nelbo reads format {FORMAT}")
    for key, kind in kinds.items():
        if not isinstance(record.get(key), kind):
            raise UserError(f"{path}: {key} must be of type {kind.__name__}, got {record.get(key)!r}; it was changed")
    for name, said in record["files"].items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != said["bytes"]:
            raise UserError(
                f"{file} must have {said['bytes']} bytes, got {size or 'no file'}: cut short or changed; prepare it "
                "again"
            )
    return record


def mapped(path: Path) -> np.ndarray:
    """An array of a .npy file, mapped for reading here and there: the system must not read on beyond what is asked for,
    which at random places costs tens of times the image itself."""
    array: np.memmap = np.load(path, mmap_mode="r", allow_pickle=False)
    if hasattr(mmap, "MADV_RANDOM"):
        array._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    return array


def open_prepared(folder: Path) -> Dataset:
    """The data set of a prepared folder, its images mapped, not read."""
    record = read_record(folder)
    found: dict[str, dict[str, np.ndarray]] = {"": {}, "-labels": {}}
    for kind, arrays in found.items():
        for split in SPLITS:
            path = folder / f"{split}{kind}.npy"
            if path.name in record["files"]:
                try:
                    arrays[split] = np.load(path, allow_pickle=False) if kind else mapped(path)
                except (OSError, ValueError) as error:
                    raise UserError(f"{path} cannot be read as an array: {error}; prepare it again") from None
    images, labels = found[""], found["-labels"]
    for split in SPLITS:
        array = images.get(split)
        if array is None or array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != images["train"].shape[1:]:
            raise UserError(f"{folder}: {split}.npy must hold uint8 images (N, C, H, W) of one shape; prepare it again")
    return Dataset(record["name"], record["version"], images, labels or None, record["levels"], record["description"])


def verify(folder: Path) -> dict[str, Any]:
    """dataset.json, after the SHA-256 of every file was found as it was written; UserError otherwise."""
    record = read_record(folder)
    for name, said in record["files"].items():
        if _digest(folder / name) != said:
            raise UserError(f"{folder / name} was changed since it was prepared (SHA-256); prepare it again")
    if content_hash(open_prepared(folder).images, record["levels"]) != record["version"]:
        raise UserError(f"{folder / FILE}: version {record['version']} is not that of its images; prepare it again")
    return record
