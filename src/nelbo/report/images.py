"""Pixels as embedded PNGs: mosaics of images, heat maps and colour bars. Enlarged without smoothing."""

import base64
import io
import math

import numpy as np
from PIL import Image

__all__ = ["colour_bar", "grid", "heat", "strip"]

GAP = 1


def _uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _enlarged(image: Image.Image, width: int) -> Image.Image:
    """The image at a whole multiple of its size, at most about ``width`` pixels wide."""
    factor = max(1, width // image.width)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _eight_bits(images: np.ndarray, levels: int) -> np.ndarray:
    """(..., C, H, W) of ``levels`` grey levels -> (..., H, W, 1 or 3); other channel counts show their mean."""
    values = np.rint(images.astype(np.float32) * 255 / (levels - 1)).clip(0, 255)
    if images.shape[-3] not in (1, 3):
        values = values.mean(-3, keepdims=True)
    return np.moveaxis(values.astype(np.uint8), -3, -1)


def _mosaic(cells: np.ndarray, columns: int, width: int) -> str:
    """(N, H, W, 1 or 3) in rows of ``columns``, with transparent gaps and rest."""
    count, high, wide, channels = cells.shape
    rows = math.ceil(count / columns)
    sheet = np.zeros((rows * (high + GAP) - GAP, columns * (wide + GAP) - GAP, channels + 1), np.uint8)
    for i, cell in enumerate(cells):
        top, left = i // columns * (high + GAP), i % columns * (wide + GAP)
        sheet[top : top + high, left : left + wide, :channels] = cell
        sheet[top : top + high, left : left + wide, channels] = 255
    return _uri(_enlarged(Image.fromarray(sheet, "LA" if channels == 1 else "RGBA"), width))


def grid(images: np.ndarray, levels: int, width: int = 420) -> str:
    """Images (N, C, H, W) in an about square grid, as a data URI."""
    return _mosaic(_eight_bits(images, levels), math.ceil(math.sqrt(len(images))), width)


def strip(trajectory: np.ndarray, levels: int, width: int = 640) -> str:
    """A trajectory (S, K, C, H, W) as K rows from noise to image, as a data URI."""
    cells = np.swapaxes(_eight_bits(trajectory, levels), 0, 1)
    return _mosaic(cells.reshape(-1, *cells.shape[2:]), len(trajectory), width)


def heat(values: np.ndarray, low: float, high: float, colours: str) -> str:
    """A map (H, W) from ``low`` to ``high`` in one of matplotlib's colour maps, as a data URI."""
    import matplotlib

    span = high - low if high > low else 1.0
    rgba = matplotlib.colormaps[colours]((values - low) / span, bytes=True)
    return _uri(_enlarged(Image.fromarray(rgba[..., :3].copy(), "RGB"), 64))


def colour_bar(colours: str) -> str:
    """A bar of all the colours of a map, left to right, as a data URI."""
    return heat(np.linspace(0, 1, 128)[None], 0, 1, colours)
