"""A data set: uint8 images in three splits, in memory or mapped from a file, and how splits are cut and hashed."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nelbo.data.loader import permutation

__all__ = ["SPLITS", "SPLIT_SEED", "Dataset", "content_hash", "cut_rows"]

SPLITS = ("train", "validation", "test")
SPLIT_SEED = 20251
CHUNK = 4096  # images hashed at once


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images in three splits."""

    name: str
    version: str
    """A content hash for files, a fixed word for built-in sets: figures compare only where name and version agree."""
    images: Mapping[str, np.ndarray]  # split -> (N, C, H, W) uint8
    labels: Mapping[str, np.ndarray] | None  # split -> (N,) int64
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


def cut_rows(count: int, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Rows of train that become other splits of the given sizes, and "train", those that stay; sorted, always the same
    for the same numbers."""
    order = permutation(count, SPLIT_SEED)
    pieces = np.split(order, np.cumsum(list(sizes.values())))
    return {split: np.sort(piece) for split, piece in zip((*sizes, "train"), pieces, strict=True)}


def content_hash(images: Mapping[str, np.ndarray], levels: int) -> str:
    """Twelve hexadecimal digits of the SHA-256 of levels, shapes and values."""
    digest = hashlib.sha256(str(levels).encode())
    for split in SPLITS:
        digest.update(str(images[split].shape).encode())
        for start in range(0, len(images[split]), CHUNK):
            digest.update(np.ascontiguousarray(images[split][start : start + CHUNK]).data)
    return digest.hexdigest()[:12]
