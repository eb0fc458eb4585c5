"""TFRecord files, and the tf.train.Example in a record.

    (1)  file       record*
         record     length: u64, check(length's 8 bytes): u32, data: length bytes, check(data): u32      little-endian
    (2)  check(b)   = (rotate right by 15 (crc32c(b)) + 0xa282ead8) mod 2^32

An Example is a protocol buffer: a sequence of fields, each a varint number << 3 | wire type and a value,

    (3)  Example   1: Features        Features   1: entry*        entry      1: name, 2: Feature
         Feature   1: BytesList | 2: FloatList | 3: Int64List     each List  1: value*
"""

import itertools
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from nelbo.errors import UserError

__all__ = ["read_example", "read_records"]

VARINT, FIXED64, COUNTED, FIXED32 = 0, 1, 2, 5  # wire types
KINDS = {1: "bytes", 2: "float", 3: "int64"}  # fields of Feature


class Malformed(Exception):
    """What is wrong with a record, as the end of a sentence."""


def read_records(path: Path) -> Iterator[bytes]:
    """The records of a file, one in memory at a time. UserError at one whose checksum is wrong or that is cut short."""
    return _records(Path(path), checksum())


def _records(path: Path, check: Callable[[bytes], int]) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for number in itertools.count():
                start = file.tell()
                if start == size:
                    return
                where = f"record {number} of {path}, at byte {start},"
                head = file.read(12)
                if len(head) < 12:
                    raise UserError(f"{where} is cut short: it begins with 12 bytes, got {len(head)}")
                length, expected = struct.unpack("<QI", head)
                if check(head[:8]) != expected:
                    raise UserError(f"{where} has a length whose checksum is wrong: no TFRecord file, or damaged")
                if length + 4 > size - start - 12:
                    raise UserError(f"{where} is cut short: {length + 4} bytes must follow, got {size - start - 12}")
                data = file.read(length)
                if struct.pack("<I", check(data)) != file.read(4):
                    raise UserError(f"{where} has data whose checksum is wrong: damaged")
                yield data
    except OSError as error:
        raise UserError(f"{path} must be a TFRecord file; it cannot be read: {error.strerror}") from error


def checksum() -> Callable[[bytes], int]:
    """Equation (2)."""
    try:
        from google_crc32c import value
    except ImportError as error:
        raise UserError("TFRecord files need google-crc32c; `pip install 'nelbo[data]'` brings it") from error

    def masked(data: bytes) -> int:
        crc = value(data)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    return masked


def read_example(record: bytes, what: str) -> dict[str, list[bytes] | list[float] | list[int]]:
    """Equation (3): the values of each feature, [] where it has none; ``what`` is the record's name in messages.

    As protocol buffers have it, of features of one name the last counts. UserError for anything but an Example.
    """
    found: dict[str, list[bytes] | list[float] | list[int]] = {}
    try:
        for features in _messages(record, 1, "Example"):
            for entry in _messages(features, 1, "Features"):
                name, values = _entry(entry)
                found[name] = values
    except Malformed as problem:
        raise UserError(f"{what} must be a tf.train.Example; it {problem}") from None
    return found


def _entry(entry: bytes) -> tuple[str, list[bytes] | list[float] | list[int]]:
    name, feature = b"", b""
    for field, wire, value in _fields(entry):
        if field not in (1, 2) or wire != COUNTED:
            raise Malformed(f"has field {field} of wire type {wire} in a feature's entry")
        name, feature = (value, feature) if field == 1 else (name, value)
    try:
        return name.decode(), _feature(feature)
    except UnicodeDecodeError:
        raise Malformed("has a feature's name that is not UTF-8") from None


def _feature(feature: bytes) -> list[bytes] | list[float] | list[int]:
    kinds = {field for field, _, _ in _fields(feature)}
    if len(kinds) > 1 or not kinds <= KINDS.keys():
        raise Malformed(f"has a feature of fields {', '.join(map(str, sorted(kinds)))}; it must be of 1, 2 or 3")
    if not kinds:
        return []
    (kind,) = kinds
    lists = _messages(feature, kind, "Feature")
    if kind == 1:
        return [value for part in lists for value in _messages(part, 1, "BytesList")]
    if kind == 2:
        return [value for part in lists for value in _floats(part)]
    return [value for part in lists for value in _integers(part)]


def _messages(data: bytes, field: int, where: str) -> list[bytes]:
    """The values of the one field that a message may have."""
    values = []
    for found, wire, value in _fields(data):
        if found != field or wire != COUNTED:
            raise Malformed(f"has field {found} of wire type {wire} in {where}")
        values.append(value)
    return values


def _floats(data: bytes) -> list[float]:
    """Of a FloatList, packed or one by one."""
    values: list[float] = []
    for field, wire, value in _fields(data):
        if field != 1 or wire not in (FIXED32, COUNTED) or len(value) % 4:
            raise Malformed(f"has field {field} of wire type {wire} and {len(value)} bytes in FloatList")
        values += struct.unpack(f"<{len(value) // 4}f", value)
    return values


def _integers(data: bytes) -> list[int]:
    """Of an Int64List, packed or one by one; negative numbers are their two's complement."""
    values: list[int] = []
    for field, wire, value in _fields(data):
        if field != 1 or wire not in (VARINT, COUNTED):
            raise Malformed(f"has field {field} of wire type {wire} in Int64List")
        position = 0
        while position < len(value):
            number, position = _varint(value, position)
            values.append(number - (number >> 63 << 64))
    return values


def _fields(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Number, wire type and bytes of each field of a message."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        field, wire = tag >> 3, tag & 7
        start = position
        if wire == VARINT:
            _, position = _varint(data, position)
        elif wire == COUNTED:
            length, start = _varint(data, position)
            position = start + length
        elif wire in (FIXED64, FIXED32):
            position += 8 if wire == FIXED64 else 4
        else:
            raise Malformed(f"has wire type {wire}")
        if position > len(data) or not 0 < field < 1 << 29:
            raise Malformed(f"has a field {field} of {position - start} bytes where {len(data) - start} are left")
        yield field, wire, data[start:position]


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number of 64 bits, seven to a byte, the lowest first; and where it ends."""
    number = 0
    for i, byte in enumerate(data[position : position + 10]):
        number |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            if number >= 1 << 64:
                break
            return number, position + i + 1
    raise Malformed("has a number that does not end, or is of more than 64 bits")
