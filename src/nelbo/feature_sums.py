"""The sums of a set of images' features (metrics.py): measured by an extractor, and kept in a file.

The file holds the sums and a record of the images (SHA-256 of their values), the extractor (its digest) and the
versions, all under one checksum. It is used where the images and the extractor are the same; where not, they are
measured again, or the file is refused where the user named it.
"""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nelbo import checkpoints, metrics
from nelbo.devices import versions
from nelbo.errors import UserError
from nelbo.extractors import Extractor, Features, as_extractor
from nelbo.group import ALONE, Group
from nelbo.metrics import Moments, Scores

__all__ = ["Images", "NotStatistics", "measure", "read_statistics", "reference_statistics", "write_statistics"]

FORMAT = 1
BLOCK = 4096  # features whose sums are taken at once, whatever the batch
ARRAYS = ("shift", "first", "second")


@dataclass(frozen=True, eq=False)
class Images:
    """uint8 images (N, C, H, W) below ``levels``, and what they are, for people."""

    values: np.ndarray
    levels: int
    what: str

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return self.values.shape[1:]

    def digest(self) -> str:
        """SHA-256 of levels, shape and values."""
        digest = hashlib.sha256(f"{self.levels} {self.values.shape}".encode())
        digest.update(np.ascontiguousarray(self.values).data)
        return digest.hexdigest()


# Measuring -----------------------------------------------------------------------------------------------------------


def measure(
    images: np.ndarray,
    levels: int,
    extractor: Extractor | Features,
    *,
    parts: int = 1,
    batch: int = 64,
    progress: Callable[[int], None] | None = None,
    group: Group = ALONE,
) -> tuple[list[Moments], list[Scores] | None]:
    """The sums of uint8 images (N, C, H, W) below ``levels``, in so many consecutive parts; no scores where the
    extractor gives no probabilities. ``progress`` is called with the images done. The processes of ``group`` share the
    batches, and all get the sums.

    The sums do not depend on the batch; features of a network in float32 do, in their last digits.
    """
    extractor = as_extractor(extractor)
    moments: list[Moments] = []
    scores: list[Scores] = []
    if progress is not None:
        progress(0)
    for part in metrics.consecutive(len(images), parts):
        for first in range(part.start, part.stop, BLOCK):
            end = min(first + BLOCK, part.stop)
            starts = range(first, end, batch)
            found: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
            for i in group.units(len(starts)):
                stop = min(starts[i] + batch, end)
                found[i] = extractor(images[starts[i] : stop], levels)
                if progress is not None:
                    progress(stop)
            everybody: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
            for theirs in group.ask(found):
                everybody |= theirs
            features = [everybody[i][0] for i in range(len(starts))]
            probabilities = [p for i in range(len(starts)) if (p := everybody[i][1]) is not None]
            block = Moments.of(np.concatenate(features))
            block_scores = [Scores.of(np.concatenate(probabilities))] if probabilities else []
            if first == part.start:
                moments.append(block)
                scores += block_scores
            else:
                moments[-1] += block
                scores[-1:] = [scores[-1] + s for s in block_scores]
    return moments, scores or None


# Statistics on disk --------------------------------------------------------------------------------------------------


class NotStatistics(UserError):
    """The file is something else: it must not be written over."""


def _checksum(record: str, arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(record.encode())
    for name in ARRAYS:
        digest.update(f"{name} {arrays[name].shape};".encode())
        digest.update(np.ascontiguousarray(arrays[name], dtype="<f8").data)
    return digest.hexdigest()


def write_statistics(path: Path, moments: Moments, record: dict[str, Any]) -> None:
    """The sums and what they are of; ``record`` is JSON. Written aside and renamed."""
    text = checkpoints.to_json({"format": FORMAT, "count": moments.count, **record})
    arrays = {name: getattr(moments, name) for name in ARRAYS}
    content = io.BytesIO()
    np.savez(content, record=np.array(text), checksum=np.array(_checksum(text, arrays)), **arrays)
    checkpoints.write_aside(path, content.getvalue())


def read_statistics(path: Path) -> tuple[Moments, dict[str, Any]]:
    """What ``write_statistics`` wrote; UserError where it was damaged or changed, or is something else."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as loaded:
            arrays = {name: loaded[name] for name in ("record", "checksum", *ARRAYS)}
    except KeyError:
        raise NotStatistics(f"{path} is not a file of statistics that nelbo wrote") from None
    except (FileNotFoundError, IsADirectoryError):
        raise NotStatistics(f"{path} is not a file") from None
    except Exception as error:  # numpy, zipfile and zlib each raise their own
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read: it was cut short or is no .npz file ({reason})") from None
    text = str(arrays["record"])
    if str(arrays["checksum"]) != _checksum(text, arrays):
        raise UserError(f"{path} was damaged or changed after it was written (its checksum disagrees): delete it")
    record = json.loads(text)
    if record["format"] != FORMAT:
        raise UserError(f"{path} has format {record['format']!r}; this version of nelbo reads format {FORMAT}")
    return Moments(record["count"], *(arrays[name] for name in ARRAYS)), record


def reference_statistics(
    images: Images,
    extractor: Extractor,
    cache: Path | None = None,
    *,
    own: bool = False,
    batch: int = 64,
    say: Callable[[str], None] = print,
    progress: Callable[[int], None] | None = None,
    group: Group = ALONE,
) -> tuple[Moments, dict[str, Any]]:
    """The sums of reference images and their record, from the file ``cache`` where it holds them, and then kept there.

    A cache of other images or another extractor is measured again and ``say`` told so. A damaged one too where it is
    nelbo's ``own``, and is refused where the user named it.
    """
    cache = None if extractor.identity is None else cache
    about = {
        "what": images.what,
        "images": {
            "sha256": images.digest(),
            "shape": list(images.values.shape),
            "levels": images.levels,
        },
        "extractor": {"name": extractor.name, "identity": extractor.identity, "note": extractor.note},
    }
    kept = None
    if group.main and cache is not None and cache.exists():
        try:
            moments, record = read_statistics(cache)
            same = record["images"] == about["images"]
            if same and record["extractor"]["identity"] == extractor.identity:
                kept = moments, {**record, **about}
            else:
                say(f"{cache} is of another {'extractor' if same else 'set of images'}: measured again")
        except UserError as error:
            if not own:
                raise
            say(f"{error}; measured again")
    if (kept := group.tell(kept)) is not None:
        return kept
    (moments,), _ = measure(images.values, images.levels, extractor, batch=batch, progress=progress, group=group)
    record = {**about, "versions": {**versions(), **extractor.versions}}
    if group.main and cache is not None:
        write_statistics(cache, moments, record)
    return moments, record
