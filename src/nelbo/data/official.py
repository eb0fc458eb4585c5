"""Named data sets: where their files are, what they must be, and how they are read.

Files are looked for in the folder that the user names and in its sub-folders; otherwise in DATA/raw/NAME (DATA: the
environment variable NELBO_DATA, or ~/.cache/nelbo), then where Debian installs them, then they are fetched to
DATA/raw/NAME, where they may be. They must have the published checksums. The prepared set is DATA/NAME.

Sources of the checksums: torchvision (CIFAR-10, Fashion-MNIST), TensorFlow datasets (ImageNet's tars and .npz). None is
published for ImageNet's pickled batches and for TensorFlow's records, which hold their own.
"""

import gzip
import hashlib
import os
import re
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from nelbo import checkpoints
from nelbo.data import archives
from nelbo.data.prepared import Piece, Plan
from nelbo.errors import UserError

__all__ = ["LEVELS", "OFFICIAL", "Official", "data_home", "official_plan"]

LEVELS = 256  # of every one of them
Show = Callable[[str, int, int], None]  # file, bytes, bytes in all or 0


@dataclass(frozen=True)
class File:
    """A published file: its name, in which * stands for numbers that its siblings count through; its checksum, such as
    "md5:..."; where it can be fetched; the MD5 of what gzip packed in it."""

    name: str
    checksum: str | None = None
    url: str | None = None
    unpacked: str | None = None


@dataclass(frozen=True)
class Official:
    """A named data set.

    ``about``, in words; ``shape`` (C, H, W) of an image; ``counts`` of the source's splits; ``cut``: how many images
    become a split that it has not; ``kits``: alternatives, any one of which holds everything; ``pieces(kit, paths)``;
    ``hint``: how to come by files that cannot be fetched; ``installed``: folders where a system's package puts them.
    """

    about: str
    shape: tuple[int, int, int]
    counts: Mapping[str, int]
    cut: Mapping[str, int]
    kits: Mapping[str, tuple[File, ...]]
    pieces: Callable[[str, list[Path]], tuple[Piece, ...]]
    hint: str
    installed: tuple[str, ...] = field(default_factory=tuple)


def data_home() -> Path:
    """The folder of named data sets."""
    return Path(os.environ.get("NELBO_DATA") or Path.home() / ".cache" / "nelbo").expanduser()


def official_plan(
    name: str, folder: Path | None = None, unofficial: bool = False, show: Show = lambda file, done, total: None
) -> Plan:
    """The plan of a named set from its files, in ``folder`` or where this module says.

    ``unofficial``: take files with other checksums and counts; the set is then called NAME-unofficial. ``show`` is told
    how far a download is.
    """
    known = OFFICIAL[name]
    kit, found = _find_kit(name, folder, show)
    origin: dict[str, Any] = {"kit": kit, "files": {}}
    for file, paths in zip(known.kits[kit], found, strict=True):
        for path in paths:
            checksum = None if file.checksum is None else _checksum(path, file)
            if file.checksum is not None and checksum not in (file.checksum, f"md5:{file.unpacked}") and not unofficial:
                raise UserError(
                    f"{path} is not the published file of {name}: {checksum}, not {file.checksum}; it is cut short or "
                    "changed (to take it as it is: --unofficial)"
                )
            origin["files"][path.name] = {"bytes": path.stat().st_size, "checksum": checksum}
    return Plan(
        name=f"{name}-unofficial" if unofficial else name, levels=LEVELS, shape=known.shape, about=known.about,
        origin=origin,
        pieces=known.pieces(kit, [path for paths in found for path in paths]),
        counts={} if unofficial else known.counts, cut=None if unofficial else known.cut,
    )  # fmt: skip


def _checksum(path: Path, file: File) -> str:
    """Of a file; or of what gzip packed in it where only that is as published: gzip can pack it in many ways."""
    assert file.checksum is not None
    kind = file.checksum.partition(":")[0]
    with open(path, "rb") as content:
        checksum = f"{kind}:{hashlib.file_digest(content, kind).hexdigest()}"
    if file.unpacked is not None and checksum not in (file.checksum, f"md5:{file.unpacked}"):
        try:
            with gzip.open(path) as packed:
                unpacked = hashlib.file_digest(packed, "md5").hexdigest()
        except (OSError, EOFError, zlib.error):
            return checksum
        return f"md5:{unpacked}" if unpacked == file.unpacked else checksum
    return checksum


def _find_kit(name: str, folder: Path | None, show: Show) -> tuple[str, list[list[Path]]]:
    """A kit that is complete in one place, and the paths of each of its files; fetched where none is and all can be."""
    known, home = OFFICIAL[name], data_home() / "raw" / name
    if folder is not None and not folder.is_dir():
        raise UserError(f"--files must name the folder that holds the files of {name}, and {folder} is none")
    for place in [folder] if folder is not None else [home, *map(Path, known.installed)]:
        for kit, files in known.kits.items():
            found = [_find(place, file.name) for file in files]
            if all(found):
                return kit, found
    kits = "; or ".join(_listed(files) for files in known.kits.values())
    for kit, files in known.kits.items():
        if folder is None and all(file.url for file in files):
            return kit, [[_fetch(name, file, home, show)] for file in files]
    raise UserError(
        f"{name} needs {kits}, in {folder or home}; {known.hint} (another folder: nelbo data {name} --files FOLDER)"
    )


def _listed(files: tuple[File, ...]) -> str:
    names = [file.name for file in files]
    return " and ".join(names) if len(names) < 5 else f"{names[0]} to {names[-1]}"


def _find(place: Path, name: str) -> list[Path]:
    """The file of that name in a folder or one of its sub-folders, or of the name without .gz; all files of a name with
    stars, which say themselves how many they are. Empty where it is not there."""
    if not place.is_dir():
        return []
    other = name.removesuffix(".gz") if name.endswith(".gz") and not name.endswith(".tar.gz") else name
    for folder in (place, *sorted(p for p in place.iterdir() if p.is_dir())):
        if "*" in name:
            paths = sorted(folder.glob(name))
            if paths:
                return _complete(paths)
            continue
        for wanted in (name, other):
            if (folder / wanted).is_file():
                return [folder / wanted]
    return []


def _complete(paths: list[Path]) -> list[Path]:
    """Files NAME-00003-of-00032, where all are there; UserError otherwise."""
    numbers = [re.search(r"-(\d+)-of-(\d+)$", path.name) for path in paths]
    counts = {int(m[2]) for m in numbers if m}
    found = sorted(int(m[1]) for m in numbers if m)
    if len(counts) != 1 or found != list(range(counts.pop())):
        raise UserError(f"{paths[0].parent} must hold every file that {paths[0].name} belongs to, got {len(paths)}")
    return paths


def _fetch(name: str, file: File, home: Path, show: Show) -> Path:
    """Download a file aside and give it its name; a complete one is kept."""
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
            if total and out.tell() != total:
                raise OSError(f"{out.tell()} of {total} bytes came")
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


# The sets ------------------------------------------------------------------------------------------------------------

ZALANDO = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
TORONTO = "https://www.cs.toronto.edu/~kriz/"
OLD = "van den Oord's ImageNet at {0}x{0} (old version); test is its validation set"
NEW = "Chrabaszcz's ImageNet at {0}x{0} (new version, anti-aliased), 1000 classes; test is its validation set"
OLD_HINT = "image-net.org/small no longer has it; Academic Torrents does"
OLD_COUNTS = {"train": 1_281_149, "test": 49_999}
NEW_COUNTS = {"train": 1_281_167, "test": 50_000}


def _old(size: int, train: str, valid: str) -> Official:
    records = "downsampled_imagenet-{}.tfrecord-*-of-*"
    return Official(
        about=OLD.format(size),
        shape=(3, size, size),
        counts=OLD_COUNTS,
        cut={"validation": 10_000},
        kits={
            "tar": (
                File(f"train_{size}x{size}.tar", f"sha256:{train}"), File(f"valid_{size}x{size}.tar", f"sha256:{valid}")
            ),
            "tfrecords": (File(records.format("train")), File(records.format("validation"))),
        },
        pieces=partial(archives.imagenet_pictures, size),
        hint=OLD_HINT,
    )  # fmt: skip


OFFICIAL: dict[str, Official] = {
    "cifar10": Official(
        about="CIFAR-10, 10 classes; test is the official one",
        shape=(3, 32, 32),
        counts={"train": 50_000, "test": 10_000},
        cut={"validation": 5000},
        kits={
            "python": (
                File(
                    "cifar-10-python.tar.gz", "md5:c58f30108f718f92721af3b95e74349a", f"{TORONTO}cifar-10-python.tar.gz"
                ),
            ),
            "python, unpacked": tuple(
                File(name, f"md5:{md5}")
                for name, md5 in (
                    ("data_batch_1", "c99cafc152244af753f735de768cd75f"),
                    ("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec"),
                    ("data_batch_3", "54ebc095f3ab1f0389bbae665268c751"),
                    ("data_batch_4", "634d18415352ddfa80567beed471001a"),
                    ("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb"),
                    ("test_batch", "40351d587109b95175f43aff81a1287e"),
                )
            ),
            "binary": (
                File(
                    "cifar-10-binary.tar.gz", "md5:c32a1d4ab5d03f1284b67883e8d87530", f"{TORONTO}cifar-10-binary.tar.gz"
                ),
            ),
            "binary, unpacked": tuple(File(f"{name}.bin") for name, _ in archives.CIFAR),
        },
        pieces=archives.cifar,
        hint="see https://www.cs.toronto.edu/~kriz/cifar.html",
    ),
    "fashion-mnist": Official(
        about="Zalando's Fashion-MNIST, 10 classes; test is the official one",
        shape=(1, 28, 28),
        counts={"train": 60_000, "test": 10_000},
        cut={"validation": 5000},
        kits={
            "idx": tuple(
                File(f"{part}-ubyte.gz", f"md5:{md5}", f"{ZALANDO}{part}-ubyte.gz", unpacked)
                for part, md5, unpacked in (
                    ("train-images-idx3", "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "f4a8712d7a061bf5bd6d2ca38dc4d50a"),
                    ("train-labels-idx1", "25c81989df183df01b3e8a0aad5dffbe", "9018921c3c673c538a1fc5bad174d6f9"),
                    ("t10k-images-idx3", "bef4ecab320f06d8554ea6380940ec79", "8181f5470baa50b63fa0f6fddb340f0a"),
                    ("t10k-labels-idx1", "bb300cfdad3c16e7a12a480ee83cd310", "15d484375f8d13e6eb1aabb0c3f46965"),
                )
            )
        },
        pieces=archives.fashion,
        hint="see https://github.com/zalandoresearch/fashion-mnist",
        installed=("/usr/share/datasets/fashion-mnist",),
    ),
    "imagenet32-old": _old(
        32,
        "244a323d48f8d72f65ad8b54658c01fed68d2d7bdc77ccb43da58c11e94224e5",
        "862e559462b24cf736212a19f6b0d47b55c2dc8ebdaa95ccecfe71260124c8f7",
    ),
    "imagenet32-new": Official(
        about=NEW.format(32),
        shape=(3, 32, 32),
        counts=NEW_COUNTS,
        cut={"validation": 10_000},
        kits={
            "batches": (*(File(f"train_data_batch_{i}") for i in range(1, 11)), File("val_data")),
            "zip of batches": (File("Imagenet32_train.zip"), File("Imagenet32_val.zip")),
            "npz": tuple(
                File(f"Imagenet32_{part}_npz.zip", f"sha256:{checksum}")
                for part, checksum in (
                    ("train", "94226337ecc1b0309d9fcd0167127aaadc931587035fbcb53925235edbaec4fc"),
                    ("val", "013990e6dec1237dcd1f9beadbab81ead6604cc119af5cacbfb59ae28148377a"),
                )
            ),
        },
        pieces=partial(archives.imagenet_batches, 32),
        hint="see https://patrykchrabaszcz.github.io/Imagenet32, or the hub: hub:OWNER/NAME",
    ),
    "imagenet64": _old(
        64,
        "e2a2c1947a748d0d256e98e6d82800d855441dc9e4de2e71a773f1324c4524d7",
        "eeac03ec4f585baf871d2b4cb9c974bfe345e74878a74e5820fe6eb1041629cd",
    ),
}
