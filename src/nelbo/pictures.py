"""Grids of images as PNG files, and arrays of samples beside them."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from nelbo.checkpoints import write_together

__all__ = ["grid", "npz", "png", "save", "save_interpolation", "save_samples", "strip"]

SHOWN = 400


def _grey(images: np.ndarray, levels: int) -> np.ndarray:
    """Levels 0 .. L - 1 spread over 0 .. 255."""
    return np.round(images.astype(np.float64) * 255 / (levels - 1)).astype(np.uint8)


def grid(images: np.ndarray, levels: int, columns: int | None = None, scale: int | None = None) -> Any:
    """A pillow image of (N, C, H, W) whole-number images side by side, a pixel ``scale`` screen pixels wide."""
    from PIL import Image

    n, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    scale = scale or max(1, round(64 / max(height, width)))
    sheet = np.full((channels, rows * (height + 1) + 1, columns * (width + 1) + 1), 128, np.uint8)
    for i, image in enumerate(_grey(images, levels)):
        top, left = 1 + i // columns * (height + 1), 1 + i % columns * (width + 1)
        sheet[:, top : top + height, left : left + width] = image
    sheet = sheet.repeat(scale, 1).repeat(scale, 2)
    if channels == 1:
        return Image.fromarray(sheet[0])
    if channels == 3:
        return Image.fromarray(np.ascontiguousarray(sheet.transpose(1, 2, 0)))
    return Image.fromarray(np.concatenate(list(sheet), 0))  # other counts: channel below channel


def strip(trajectory: np.ndarray, levels: int) -> Any:
    """A pillow image of (S, K, C, H, W): a row for each of the K images, from noise on the left to the image."""
    moments, count = trajectory.shape[:2]
    return grid(trajectory.swapaxes(0, 1).reshape(moments * count, *trajectory.shape[2:]), levels, columns=moments)


def png(picture: Any) -> bytes:
    """A pillow image as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def npz(**arrays: Any) -> bytes:
    """Arrays as an .npz file, compressed."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def save(stem: Path, files: dict[str, bytes]) -> list[Path]:
    """STEM and an ending -> contents, written aside and, when all are, renamed; their paths."""
    contents: dict[Path, bytes | str] = {stem.with_name(stem.name + ending): files[ending] for ending in files}
    write_together(contents)
    return list(contents)


def save_samples(
    stem: Path, images: Any, levels: int, trajectory: np.ndarray | None = None, moments: np.ndarray | None = None
) -> list[Path]:
    """STEM.npz and STEM.png, and STEM-trajectory.png where a trajectory (S, K, C, H, W) is given; their paths.

    The .npz holds all images, the picture the first ``SHOWN``.
    """
    images = np.asarray(images)
    shown = {} if trajectory is None else {"trajectory": trajectory, "trajectory_t": moments}
    files = {
        ".npz": npz(images=images, levels=np.int64(levels), **shown),
        ".png": png(grid(images[:SHOWN], levels)),
    }
    if trajectory is not None:
        files["-trajectory.png"] = png(strip(trajectory, levels))
    return save(stem, files)


def save_interpolation(stem: Path, images: Any, weights: Any, ends: Any, levels: int) -> list[Path]:
    """STEM.npz, with images (n, C, H, W) at weights (n,) between two ends (2, C, H, W), and STEM.png, a row of them
    between the two; their paths."""
    images, ends = np.asarray(images), np.asarray(ends)
    row = np.concatenate((ends[:1], images, ends[1:]))
    return save(
        stem,
        {
            ".npz": npz(images=images, levels=np.int64(levels), weights=np.asarray(weights), ends=ends),
            ".png": png(grid(row, levels, columns=len(row))),
        },
    )
