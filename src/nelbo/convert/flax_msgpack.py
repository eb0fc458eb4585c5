r"""Files of flax.serialization (msgpack), read as data into dictionaries and arrays; no JAX and no flax.

A file is one tree of maps with text keys. Its leaves are nil, booleans, numbers, text, bytes, or an extension:

    (1)  ndarray           the message [shape, name of the type, bytes in C order]
    (2)  complex           the message [real part, imaginary part]
    (3)  scalar of numpy   as (1), with the shape []

Lists and tuples were written as maps with the keys "0", "1", ... An array above flax's limit (1 GiB) lies in pieces:

    {"__msgpack_chunked_array__": true, "shape": {"0": ...}, "chunks": {"0": flat piece, ...}}

bfloat16 is returned as float32, which holds it exactly. No length that a file claims is believed beyond its own size.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from nelbo.errors import UserError

__all__ = ["read", "unpack"]

CHUNKED = "__msgpack_chunked_array__"
TYPES = {
    name: np.dtype(name)
    for name in (
        "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32",
        "float64", "complex64", "complex128",
    )
}  # fmt: skip
AXES, ENTRIES = 32, 2**16  # most axes of an array, most entries of a map: msgpack sets memory aside for what is claimed


def read(path: Path) -> dict[str, Any]:
    """The tree of a file; UserError where it cannot be read or is not flax's."""
    _library()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    try:
        return unpack(content)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a checkpoint of flax, or is damaged or cut off: {reason}") from None


def unpack(content: bytes) -> dict[str, Any]:
    """The tree that the bytes hold; ValueError that says what is wrong with them."""
    tree = _message(content, 0, object_pairs_hook=_map, ext_hook=_extension)
    if not isinstance(tree, dict) or CHUNKED in tree:
        raise ValueError("it does not hold a map of names")
    return _checked(tree, "")


def _library() -> Any:
    try:
        import msgpack
    except ImportError as error:
        raise UserError(f"files of flax need msgpack: pip install 'nelbo[convert]' ({error})") from None
    return msgpack


def _message(content: bytes, list_length: int, **hooks: Any) -> Any:
    """One msgpack message; ValueError for anything else, whatever msgpack raises."""
    msgpack, size = _library(), len(content)
    try:
        return msgpack.unpackb(
            content, raw=False, strict_map_key=True, max_str_len=size, max_bin_len=size, max_ext_len=size,
            max_array_len=list_length, max_map_len=min(size, ENTRIES), **hooks,
        )  # fmt: skip
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise ValueError(str(error) or type(error).__name__) from None


def _map(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice in one map")
    if not all(isinstance(name, str) for name in found):
        raise ValueError("a name is not text")
    return found


def _extension(code: int, data: bytes) -> Any:
    """Extensions (1) to (3)."""
    if code == 2:
        parts = _message(data, 2)
        if not isinstance(parts, list) or [type(p) for p in parts] != [float, float]:
            raise ValueError("a complex number without its two parts")
        return complex(*parts)
    if code not in (1, 3):
        raise ValueError(f"extension {code}, of which flax has only 1, 2 and 3")
    array = _array(data)
    if code == 3 and array.ndim:
        raise ValueError(f"a scalar of shape {array.shape}")
    return array if code == 1 else array[()]


def _array(data: bytes) -> np.ndarray:
    """Extension (1)."""
    parts = _message(data, AXES)
    if not isinstance(parts, list) or [type(p) for p in parts] != [list, str, bytes]:
        raise ValueError("an array without shape, type and bytes")
    shape, name, content = parts
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"an array of shape {shape}")
    if name not in TYPES and name != "bfloat16":
        raise ValueError(f"an array of type {name[:40]!r}; the choices are {', '.join(TYPES)}, bfloat16")
    kind = np.dtype(np.uint16) if name == "bfloat16" else TYPES[name]
    wanted = math.prod(shape) * kind.itemsize
    if len(content) != wanted:
        raise ValueError(f"an array of shape {shape} and type {name} with {len(content)} bytes in place of {wanted}")
    array = np.frombuffer(content, kind.newbyteorder("<")).reshape(shape)
    if name == "bfloat16":  # the upper half of a float32
        return np.asarray(array.astype("<u4") << 16).view("<f4")
    return array


def _checked(tree: dict[str, Any], where: str) -> Any:
    """The tree with its arrays in one piece; leaves of other kinds (a time) are refused."""
    if CHUNKED in tree:
        return _joined(tree, where)
    found = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            value = _checked(value, f"{where}{name}/")
        elif not isinstance(value, (np.ndarray, np.generic, bool, int, float, complex, str, bytes, type(None))):
            raise ValueError(f"{where}{name} is a {type(value).__name__}")
        found[name] = value
    return found


def _joined(tree: dict[str, Any], where: str) -> np.ndarray:
    """An array that lies in pieces."""
    shape, chunks = (_sequence(tree.get(part), where + part) for part in ("shape", "chunks"))
    flat = all(isinstance(c, np.ndarray) and c.ndim == 1 for c in chunks)
    if set(tree) != {CHUNKED, "shape", "chunks"} or not all(type(n) is int and n >= 0 for n in shape) or not flat:
        raise ValueError(f"{where} is an array in pieces without its shape or its pieces")
    if not chunks or len({c.dtype for c in chunks}) != 1 or sum(map(len, chunks)) != math.prod(shape):
        raise ValueError(f"the pieces of {where} do not make an array of shape {tuple(shape)}")
    return np.concatenate(chunks).reshape(shape)


def _sequence(value: Any, where: str) -> list[Any]:
    """The values of a map with the keys "0", "1", ..."""
    keys = [str(i) for i in range(len(value))] if isinstance(value, dict) else None
    if keys is None or set(value) != set(keys) or len(keys) > ENTRIES:
        raise ValueError(f"{where} is not numbered from 0")
    return [value[key] for key in keys]
