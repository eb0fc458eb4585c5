"""Named data sets: where their files are, what they must be, and how they are read.

Files are looked for in the folder that the user names, then in DATA/raw/NAME (DATA: the environment variable NELBO_DATA,
~/.cache/nelbo otherwise), then where Debian installs them, then fetched to DATA/raw/NAME where they may be. They must
have the published checksums. The prepared set is DATA/NAME.
"""

import gzip
import hashlib
import os
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nelbo import checkpoints
from nelbo.data.prepared import Images, Piece, Plan
from nelbo.errors import UserError

__all__ = ["OFFICIAL", "Official", "data_home", "find_files", "official_plan"]

Show = Callable[[str, int, int], None]


@dataclass(frozen=True)
class File:
    """A published file: its name, its MD5 and that of what gzip packed in it, where they are published, and where it
    can be fetched."""

    name: str
    md5: str | None = None
    url: str | None = None
    unpacked: str | None = None


@dataclass(frozen=True)
class Official:
    """A named data set.

    ``kits``: alternatives, any one of which holds everything; ``counts`` of the source's splits; ``cut``: the images
    that become validation or test where the source has none; ``pieces(paths)``; ``about``, in words; ``hint``: how to
    get the files where they cannot be fetched; ``installed``: folders where a system's package puts them.
    """

    about: str
    counts: Mapping[str, int]
    cut: Mapping[str, int]
    kits: Mapping[str, tuple[File, ...]]
    pieces: Callable[[str, list[Path]], tuple[Piece, ...]]
    hint: str
    levels: int = 256
    installed: tuple[str, ...] = field(default_factory=tuple)


def data_home() -> Path:
    """The folder of named data sets."""
    return Path(os.environ.get("NELBO_DATA") or Path.home() / ".cache" / "nelbo").expanduser()


def official_plan(
    name: str, folder: Path | None = None, unofficial: bool = False, show: Show = lambda name, done, total: None
) -> Plan:
    """The plan of a named set from its files, in ``folder`` or where this module says.

    ``unofficial``: take files with other checksums and counts; the set is then called NAME-unofficial.
    """
    set_ = OFFICIAL[name]
    kit, paths = find_files(name, folder, show)
    origin: dict[str, Any] = {"kit": kit, "files": {}}
    for path, file in zip(paths, set_.kits[kit], strict=True):
        md5, known = _checksum(path, file), file.md5 is not None
        published = known and md5 in (file.md5, file.unpacked)
        if known and not published and not unofficial:
            raise UserError(
                f"{path} is not the published file of {name}: MD5 {md5}, not {file.md5}; it is cut short or changed (to "
                "take it as it is: --unofficial)"
            )
        origin["files"][path.name] = {"bytes": path.stat().st_size, "md5": md5, "published": published}
    return Plan(
        name=f"{name}-unofficial" if unofficial else name, pieces=set_.pieces(kit, paths), levels=set_.levels,
        about=set_.about, counts={} if unofficial else set_.counts, cut=None if unofficial else set_.cut, origin=origin,
    )  # fmt: skip


def _checksum(path: Path, file: File) -> str:
    """MD5 of a file, or of what gzip packed in it where only that is as published: gzip can pack it in many ways."""
    with open(path, "rb") as content:
        md5 = hashlib.file_digest(content, "md5").hexdigest()
    if file.unpacked is None or md5 in (file.md5, file.unpacked):
        return md5
    try:
        with gzip.open(path) as packed:
            unpacked = hashlib.file_digest(packed, "md5").hexdigest()  # type: ignore[arg-type]
    except (OSError, EOFError, zlib.error):
        return md5
    return unpacked if unpacked == file.unpacked else md5


def find_files(name: str, folder: Path | None, show: Show) -> tuple[str, list[Path]]:
    """A kit that is complete in one folder, and its files; fetched where none is and all can be."""
    set_, home = OFFICIAL[name], data_home() / "raw" / name
    places = [folder] if folder is not None else [home, *map(Path, set_.installed)]
    for place in places:
        for kit, files in set_.kits.items():
            paths = [_find(place, file.name) for file in files]
            if all(paths):
                return kit, [path for path in paths if path is not None]
    kits = "; or ".join(_listed(files) for files in set_.kits.values())
    for kit, files in set_.kits.items():
        if folder is None and all(file.url for file in files):
            return kit, [_fetch(name, file, home, show) for file in files]
    where = folder or home
    raise UserError(f"{name} needs {kits} in {where}; {set_.hint} (another folder: nelbo data {name} --files FOLDER)")


def _listed(files: tuple[File, ...]) -> str:
    names = [file.name for file in files]
    return ", ".join(names) if len(names) < 6 else f"{names[0]} to {names[-1]}"


def _find(folder: Path, name: str) -> Path | None:
    """A file of that name in a folder, or packed or unpacked by gzip."""
    other = name.removesuffix(".gz") if name.endswith(".gz") and not name.endswith(".tar.gz") else name
    return next((folder / n for n in (name, other) if (folder / n).is_file()), None)


def _fetch(name: str, file: File, home: Path, show: Show) -> Path:
    """Download a file aside, check it and give it its name."""
    path, aside = home / file.name, home / f".{file.name}.tmp-{os.getpid()}"
    if path.is_file():
        return path
    checkpoints.make_folder(home)
    assert file.url is not None
    try:
        with urllib.request.urlopen(file.url, timeout=60) as answer, open(aside, "wb") as out:
            total = int(answer.headers.get("Content-Length") or 0)
            while block := answer.read(1 << 20):
                out.write(block)
                show(file.name, out.tell(), total)
        with open(aside, "rb") as written:
            md5 = hashlib.file_digest(written, "md5").hexdigest()
        if file.md5 not in (None, md5):
            raise UserError(f"{file.url} is not the published file of {name}: MD5 {md5}, not {file.md5}")
        os.replace(aside, path)
    except OSError as error:  # urllib's errors too
        reason = getattr(error, "reason", None) or error.strerror or error
        raise UserError(
            f"{name} is not here and cannot be fetched: {file.url}: {reason}; put {file.name} into {home}, or name its "
            f"folder: nelbo data {name} --files FOLDER"
        ) from None
    finally:
        aside.unlink(missing_ok=True)
    return path


# Fashion-MNIST -------------------------------------------------------------------------------------------------------


def _idx(images: Path, labels: Path) -> Images:
    from nelbo.data.idx import read_idx

    pixels, classes = read_idx(images), read_idx(labels)
    if pixels.ndim != 3 or classes.ndim != 1 or len(pixels) != len(classes):
        raise UserError(
            f"{images} and {labels} must hold as many images as labels, got {pixels.shape}, {classes.shape}"
        )
    return pixels[:, None], classes.astype(np.int64)


def _fashion(kit: str, paths: list[Path]) -> tuple[Piece, ...]:
    return tuple(
        Piece(split, images.name, partial(_idx, images, labels))
        for split, images, labels in (("train", paths[0], paths[1]), ("test", paths[2], paths[3]))
    )


FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"

OFFICIAL: dict[str, Official] = {
    "fashion-mnist": Official(
        about="Zalando's Fashion-MNIST, 10 classes; test is the official one",
        counts={"train": 60_000, "test": 10_000},
        cut={"validation": 5000},
        kits={
            "idx": tuple(
                File(f"{part}-ubyte.gz", md5, f"{FASHION}{part}-ubyte.gz", unpacked)
                for part, md5, unpacked in (
                    ("train-images-idx3", "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "f4a8712d7a061bf5bd6d2ca38dc4d50a"),
                    ("train-labels-idx1", "25c81989df183df01b3e8a0aad5dffbe", "9018921c3c673c538a1fc5bad174d6f9"),
                    ("t10k-images-idx3", "bef4ecab320f06d8554ea6380940ec79", "8181f5470baa50b63fa0f6fddb340f0a"),
                    ("t10k-labels-idx1", "bb300cfdad3c16e7a12a480ee83cd310", "15d484375f8d13e6eb1aabb0c3f46965"),
                )
            )
        },
        pieces=_fashion,
        hint="see https://github.com/zalandoresearch/fashion-mnist; Debian's package dataset-fashion-mnist has it",
        installed=("/usr/share/datasets/fashion-mnist",),
    ),
}
