"""IDX files of bytes, as MNIST and its like come in, raw or compressed by gzip.

0, 0, 8 (unsigned bytes), axes (1: labels, 3: images)     four bytes
size of each axis                                         u32, big-endian
the values, the last axis fastest
"""

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nelbo.errors import UserError

__all__ = ["read_idx"]

AXES = (1, 3)
GZIP = b"\x1f\x8b"
LIMIT = 1 << 32  # bytes of values
RATIO = 1040  # deflate makes at most 1032 bytes of one
CHUNK = 1 << 20


def read_idx(path: Path) -> np.ndarray:
    """The values, (N,) or (N, H, W) uint8. UserError where the file is no IDX file of bytes, or not of the size that it
    says; at most that size is ever inflated."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            packed = file.read(2) == GZIP
            file.seek(0)
            if not packed:
                return _read(file, path, size)
            with gzip.GzipFile(fileobj=file, mode="rb") as inflated:
                return _read(inflated, path, RATIO * size)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} must be an IDX file, raw or in gzip; its gzip is damaged: {error}") from error
    except OSError as error:
        raise UserError(f"{path} must be an IDX file; it cannot be read: {error.strerror}") from error


def _read(file: BinaryIO | gzip.GzipFile, path: Path, most: int) -> np.ndarray:
    """The values of a file that cannot hold more than ``most`` bytes."""
    head = file.read(4)
    if len(head) < 4 or head[:3] != b"\x00\x00\x08" or head[3] not in AXES:
        raise UserError(
            f"{path} must be an IDX file of bytes with 1 or 3 axes, and begin with 00000801 or 00000803; "
            f"it begins with {head.hex() or 'nothing'}"
        )
    sizes = file.read(4 * head[3])
    if len(sizes) < 4 * head[3]:
        raise UserError(f"{path} is cut short: {head[3]} sizes of axes must follow, got {len(sizes)} bytes")
    shape = tuple(int(size) for size in np.frombuffer(sizes, ">u4"))
    count = math.prod(shape)
    if not count:
        raise UserError(f"{path} must hold at least 1 value, got shape {shape}")
    if count > min(most, LIMIT):
        raise UserError(f"{path} says that it holds {count} values, more than it can; {min(most, LIMIT)} at most")
    values = bytearray()
    while len(values) <= count:
        chunk = file.read(min(CHUNK, count + 1 - len(values)))
        if not chunk:
            break
        values += chunk
    if len(values) != count:
        got = f"{len(values)}" if len(values) < count else "more"
        raise UserError(f"{path} must hold {count} values for its shape {shape}, got {got}")
    return np.frombuffer(values, np.uint8).reshape(shape)
