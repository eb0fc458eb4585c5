"""Images in numbered files, of which a killed process leaves the complete ones.

FOLDER/meta.json            what the images are of: settings, how many, how many a shard; written first
FOLDER/shard-00000.npz      images 0 .. n - 1 and their levels
FOLDER/shard-00000.png      the first of them in a grid
FOLDER/shard-00000.json     size and SHA-256 of the .npz; written last: with it the shard is complete
"""

import hashlib
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nelbo import checkpoints, pictures
from nelbo.devices import versions
from nelbo.errors import UserError

__all__ = ["Shards", "is_shards", "read_shards"]

FORMAT = 1
META = {"format": int, "count": int, "shard": int, "levels": int, "shape": list, "settings": dict}


class Shards:
    """The shards of a folder; ``meta``, the contents of its meta.json."""

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.folder, self.meta = folder, meta

    @classmethod
    def read(cls, folder: Path) -> "Shards":
        """Those of a folder that has begun; UserError where it has not, or its meta.json is another program's."""
        path = folder / "meta.json"
        if not is_shards(folder):
            raise UserError(
                f"{folder} holds no shards of samples; `nelbo sample RUN --shard N --out {folder}` makes some"
            )
        meta = checkpoints.read_json(path)
        for key, kind in META.items():
            if not isinstance(meta, dict) or not isinstance(meta.get(key), kind):
                raise UserError(
                    f"{path}: {key} is missing or not of type {kind.__name__}: another program's, or changed"
                )
        if meta["format"] != FORMAT:
            raise UserError(f"{path} has format {meta['format']}; this version of nelbo reads format {FORMAT}")
        return cls(folder, meta)

    @classmethod
    def begin(
        cls, folder: Path, settings: dict[str, Any], count: int, shard: int, shape: tuple[int, ...], levels: int
    ) -> "Shards":
        """Those of a new or empty folder, or of one that began with the same settings (JSON); UserError otherwise."""
        meta = {
            "format": FORMAT, "count": count, "shard": shard, "levels": levels, "shape": list(shape),
            "settings": settings, "versions": versions(),
        }  # fmt: skip
        checkpoints.make_folder(folder)
        for left in folder.glob(".*.tmp-*"):  # by a killed process
            left.unlink(missing_ok=True)
        if is_shards(folder):
            kept = cls.read(folder)
            _same(kept, meta)
            return kept
        if any(folder.iterdir()):
            raise UserError(f"{folder} holds something else and no meta.json; --out needs a new or empty folder")
        checkpoints.write_json(folder / "meta.json", meta)
        return cls(folder, meta)

    def __len__(self) -> int:
        return math.ceil(self.meta["count"] / self.meta["shard"])

    def numbers(self, i: int) -> range:
        """The samples of shard i."""
        return range(self.meta["count"])[i * self.meta["shard"] : (i + 1) * self.meta["shard"]]

    def path(self, i: int, suffix: str = ".npz") -> Path:
        """A file of shard i."""
        return self.folder / f"shard-{i:05d}{suffix}"

    def images(self, i: int) -> np.ndarray | None:
        """Those of shard i, (n, C, H, W) uint8; None where it is missing, cut short or changed."""
        content = self._content(i)
        if content is None:
            return None
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return np.asarray(arrays["images"])

    def complete(self, i: int) -> bool:
        """Whether shard i is there as it was written."""
        return self._content(i) is not None

    def _content(self, i: int) -> bytes | None:
        try:
            said, content = checkpoints.read_json(self.path(i, ".json")), self.path(i).read_bytes()
        except (OSError, UserError):
            return None
        return content if isinstance(said, dict) and said | _digest(content) == said else None

    def write(self, i: int, images: np.ndarray) -> None:
        """Keep shard i; each file is written aside and renamed."""
        content = pictures.npz(images=images, levels=np.int64(self.meta["levels"]))
        self.draw(i, images)
        checkpoints.write_aside(self.path(i), content)
        checkpoints.write_json(self.path(i, ".json"), {"images": len(images), **_digest(content)})

    def draw(self, i: int, images: np.ndarray) -> None:
        """The grid of shard i."""
        checkpoints.write_aside(
            self.path(i, ".png"), pictures.png(pictures.grid(images[: pictures.SHOWN], self.meta["levels"]))
        )


def _digest(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _same(kept: Shards, meta: dict[str, Any]) -> None:
    """UserError where shards are of other settings, by name."""
    before, now = (
        {**m["settings"], **{k: m[k] for k in ("count", "shard", "levels", "shape")}} for m in (kept.meta, meta)
    )
    for key in now:
        if before.get(key) != now[key]:
            raise UserError(
                f"{key} was {before.get(key)} when {kept.folder} began and is {now[key]}; give that, or another --out"
            )


def is_shards(folder: Path) -> bool:
    """Whether a folder holds shards, complete or not."""
    return (folder / "meta.json").is_file() and not (folder / "run.json").exists()


def read_shards(folder: Path | str) -> Iterator[np.ndarray]:
    """The images of all shards of a folder, (n, C, H, W) uint8 each, in the order of their numbers, one shard in memory
    at a time. UserError before the first where one is missing, and at one that is cut short or changed."""
    shards = Shards.read(Path(folder))
    missing = [i for i in range(len(shards)) if not shards.path(i, ".json").is_file()]
    if missing:
        raise UserError(
            f"{folder} is not complete: {len(missing)} of {len(shards)} shards are missing, the first "
            f"{shards.path(missing[0]).name}; the command that made it continues"
        )
    return _each(shards)


def _each(shards: Shards) -> Iterator[np.ndarray]:
    for i in range(len(shards)):
        images = shards.images(i)
        if images is None:
            raise UserError(f"{shards.path(i)} is cut short or was changed; the command that made it draws it again")
        yield images
