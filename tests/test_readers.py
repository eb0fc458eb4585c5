"""Readers of archives: what real writers wrote is read to the value, and nothing else gets through, or is run."""

import gzip
import io
import math
import pickle
import pickletools
import struct
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fuzzing import mutants
from nelbo.data import pickles
from nelbo.data.idx import read_idx
from nelbo.data.pickles import read_pickle
from nelbo.data.tfrecords import read_example, read_records
from nelbo.errors import UserError

FIXTURES = Path(__file__).resolve().parent / "readers"
FASHION = Path("/usr/share/datasets/fashion-mnist")
PLAIN = "batch must be a pickle of dicts, lists, tuples, strings, numbers and plain numpy arrays; at byte "
MUTANTS = 10_000


def message_of(read: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        read()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


def same(a: Any, b: Any) -> bool:
    """Whether two values are of the same types and equal, NaN to NaN."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (a != a and b != b)


# Pickles: values

ARRAYS = {
    "images": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    "big end": np.arange(6).astype(">f4").reshape(2, 3),
    "fortran": np.arange(6.0).reshape(2, 3).T,
    "axes": np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2),
    "strided": np.arange(12, dtype=np.int16)[::3],
    "scalar": np.array(7, np.uint64),
    "empty": np.zeros((0, 3), np.float16),
    "bools": np.array([True, False, True]),
}
VALUE = {
    **ARRAYS,
    "labels": [0, 255, 256, 65535, 65536, -1, 2**31, -(2**31), 2**40, 2**63 - 1, -(2**63), 2**64 - 1],
    "floats": (0.1, -2.5, 1e300, math.inf, -math.inf, math.nan, 0.0),
    "constants": [None, True, False],
    "strings": ["", "a", "café\n\\'\u2603", "x" * 300],
    "bytes": [b"", b"b", bytes(range(256)), b"y" * 300],
    "nested": {"a": {"b": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}]}},
    "twice": ["once", "once", ARRAYS["images"], ARRAYS["images"]],
}


EXPECTED = {**VALUE, "big end": np.arange(6, dtype=np.float32).reshape(2, 3)}


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_python_3(protocol: int) -> None:
    for content in (pickle.dumps(VALUE, protocol), pickletools.optimize(pickle.dumps(VALUE, protocol))):
        assert same(read_pickle(content, "batch"), EXPECTED)
        older = content.replace(b"numpy._core.", b"numpy.core.")  # what numpy 1 wrote, but for lengths
        if protocol < 4:
            assert older != content and same(read_pickle(older, "batch"), EXPECTED)


def test_numbers_of_numpy_become_pythons() -> None:
    value = {"a": np.float32(1.5), "b": np.int64(-3), "c": np.bool_(True), "d": np.float16(0.25)}
    for protocol in range(6):
        assert same(read_pickle(pickle.dumps(value, protocol), "x"), {"a": 1.5, "b": -3, "c": True, "d": 0.25})


def test_a_batch_as_imagenet32s() -> None:
    rng = np.random.default_rng(0)
    batch = {
        "data": rng.integers(0, 256, (500, 3072), dtype=np.uint8),
        "labels": rng.integers(1, 1001, 500).tolist(),
        "mean": rng.random(3072),
    }
    for protocol in (2, 3, 4, 5):
        assert same(read_pickle(pickle.dumps(batch, protocol), "val_data"), batch)


@pytest.mark.parametrize("protocol", range(3))
def test_pickles_of_python_2(protocol: int) -> None:
    """As CIFAR-10's; readers/make_python2.py wrote them."""
    got = read_pickle((FIXTURES / f"python2-{protocol}.pkl").read_bytes(), "batch")
    expected = {
        b"data": (np.arange(256).reshape(8, 32) * 7 % 256).astype(np.uint8),
        b"labels": [6, 9, 300, -1, 2**40, 70000, 0, 1],
        b"batch_label": b"training batch 1 of 5",
        b"filenames": [b"leptodactylus_s_000004.png", b"it's.png", b'"\\\n\t\r\x00\xff.png'],
        b"mean": np.arange(6.0).reshape(2, 3).T / 4,
        b"scalar": 1.5,
        b"more": ("café\n\\", None, True, 0.1, {}, (), (1,)),
    }
    assert same({key: got[key] for key in expected}, expected) and got.keys() == expected.keys()
    assert got[b"mean"].flags.f_contiguous


def test_what_was_written_by_hand() -> None:
    """CIFAR-10's opcodes, in its order."""
    content = (
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03U\x06labelsq\x04]q\x05(K\x06K\x09M\x2c\x01"
        b"eU\x04dataq\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\x09(K\x01"
        b"K\x03K\x02\x86cnumpy\ndtype\nq\x0aU\x02u1K\x00K\x01\x87Rq\x0b(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
        b"K\x00tb\x89U\x06\x00\x01\x02\xfd\xfe\xfftbU\tfilenamesq\x0c]q\x0d(U\x05a.pngq\x0eU\x05b.pngq\x0feu."
    )
    assert same(
        read_pickle(content, "batch"),
        {
            b"batch_label": b"training batch 1 of 5",
            b"labels": [6, 9, 300],
            b"data": np.array([[0, 1], [2, 253], [254, 255]], np.uint8),
            b"filenames": [b"a.png", b"b.png"],
        },
    )
    assert same(read_pickle(content, "batch"), pickle.loads(content, encoding="bytes"))


def test_arrays_are_read_only() -> None:
    got = read_pickle(pickle.dumps(np.arange(5)), "x")
    assert not got.flags.writeable and not got.flags.owndata
    got = read_pickle(pickle.dumps(np.arange(5).astype(">i8")), "x")
    assert not got.flags.writeable and got.dtype.isnative and got.tolist() == [0, 1, 2, 3, 4]


# Pickles: what is refused


def string(data: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(data)) + data


def executing(line: bytes) -> dict[str, bytes]:
    """Pickles with which Python's own reader would run a command."""
    quoted, code = b"S'" + line + b"'\n", b"__import__('posix').system('" + line + b"')"
    return {
        "GLOBAL": b"cposix\nsystem\n(" + quoted + b"tR.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + string(line) + b"\x85R.",
        "INST": b"(" + quoted + b"iposix\nsystem\n.",
        "OBJ": b"\x80\x02(cposix\nsystem\n" + string(line) + b"o.",
        "eval": b"\x80\x03cbuiltins\neval\n" + string(code) + b"\x85R.",
        "__setstate__": b"\x80\x02ccollections\nOrderedDict\n)R}" + string(b"__setstate__") + b"cposix\nsystem\nsb" +
        string(line) + b"b.",
    }  # fmt: skip


@pytest.mark.parametrize(
    "kind, problem",
    [
        ("GLOBAL", "0 it names 'posix.system', which is no part of plain data"),
        ("STACK_GLOBAL", "17 it names 'posix.system', which is no part of plain data"),
        ("INST", "{} it has the opcode INST, which plain data do not need"),
        ("OBJ", "3 it names 'posix.system', which is no part of plain data"),
        ("eval", "2 it names 'builtins.eval', which is no part of plain data"),
        ("__setstate__", "2 it names 'collections.OrderedDict', which is no part of plain data"),
    ],
)
def test_nothing_is_executed(tmp_path: Path, kind: str, problem: str) -> None:
    canary = tmp_path / "canary"
    content = executing(f": > {canary}".encode())[kind]
    said = message_of(lambda: read_pickle(content, "batch"))
    assert said == PLAIN + problem.format(content.find(b"iposix"))
    assert not canary.exists()
    pickle.loads(content)  # which shows that it would have been
    assert canary.exists()


def test_nothing_is_imported() -> None:
    assert "this" not in sys.modules
    for content in (b"cthis\ns\n.", b"\x80\x04\x8c\x04this\x8c\x01s\x93."):
        assert "names 'this.s'" in message_of(lambda content=content: read_pickle(content, "batch"))
    assert "this" not in sys.modules


def array(shape: bytes, data: bytes = b"C\x04abcd", kind: bytes = b"u1", order: bytes = b"|") -> bytes:
    """A pickle of an array, whose shape and data are opcodes."""
    return (
        b"\x80\x03cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01" + shape +
        b"cnumpy\ndtype\nU" + bytes([len(kind)]) + kind + b"K\x00K\x01\x87R(K\x03U\x01" + order +
        b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89" + data + b"tb."
    )  # fmt: skip


def integer(value: int) -> bytes:
    raw = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


DTYPE = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
STATE = b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
NO_PART = "which plain data do not need"


@pytest.mark.parametrize(
    "content, problem",
    [
        # Opcodes that nothing needs
        (b"\x80\x02cnumpy\nndarray\n)\x81.", f"it has the opcode NEWOBJ, {NO_PART}"),
        (b"\x80\x04cnumpy\nndarray\n)}\x92.", f"it has the opcode NEWOBJ_EX, {NO_PART}"),
        (b"Pname\n.", f"0 it has the opcode PERSID, {NO_PART}"),
        (b"U\x04nameQ.", f"6 it has the opcode BINPERSID, {NO_PART}"),
        (b"\x82\x01.", f"it has the opcode EXT1, {NO_PART}"),
        (b"\x83\x01\x00.", f"it has the opcode EXT2, {NO_PART}"),
        (b"\x84\x01\x00\x00\x00.", f"it has the opcode EXT4, {NO_PART}"),
        (b"\x80\x05\x97.", f"it has the opcode NEXT_BUFFER, {NO_PART}"),
        (b"\x80\x04\x8f.", f"it has the opcode EMPTY_SET, {NO_PART}"),
        (b"N2.", f"it has the opcode DUP, {NO_PART}"),
        (b"NN0.", f"it has the opcode POP, {NO_PART}"),
        (b"\xff.", f"it has the opcode 'ÿ', {NO_PART}"),
        # Calls that numpy does not write
        (b"cnumpy\nndarray\n(K\x02tR.", "it calls ndarray with other arguments than numpy's"),
        (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\ndtype\nK\x00\x85C\x01b\x87R.", "it calls _reconstruct with"),
        (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x09\x85C\x01b\x87R.", "it calls _reconstruct with"),
        (b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R.", "it calls encode with other arguments"),
        (b"c_codecs\nencode\n" + string("\u2603".encode()) + string(b"latin1") + b"\x86R.", "that is not Latin-1"),
        (b"c__builtin__\nbytes\nJ\xff\xff\xff\x7f\x85R.", "it calls bytes with other arguments than numpy's"),
        (b"cnumpy.core.multiarray\nfromfile\n.", "it names 'numpy.core.multiarray.fromfile'"),
        (b"cnumpy\nload\n.", "it names 'numpy.load'"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0fdtype.__class__\x93.", "it names 'numpy.dtype.__class__'"),
        (b"\x80\x04K\x01\x8c\x05dtype\x93.", "it names 'dtype' of 1"),
        (b"K\x01)R.", "it calls 1 with other arguments than numpy's"),
        (b"]]R.", "it calls a value of type list with other arguments than numpy's"),
        (b"cnumpy.core.multiarray\nscalar\n" + DTYPE + b"C\x01a\x86R.", "it has an array of a dtype without a state"),
        (b"cnumpy.core.multiarray\nscalar\n" + DTYPE + STATE + b"C\x02ab\x86R.", "of shape () and type u1 with 2"),
        # Objects inside arrays
        (array(b"K\x01\x85", b"](Nae", b"O8"), "it has a dtype 'O8'; the choices are b1, i1"),
        (b"cnumpy._core.multiarray\nscalar\ncnumpy\ndtype\nU\x02O8K\x00K\x01\x87R", "it has a dtype 'O8'; the"),
        (array(b"K\x01\x85", kind=b"V8"), "it has a dtype 'V8'; the choices are b1, i1"),
        (array(b"K\x01\x85", kind=b"S4"), "it has a dtype 'S4'; the choices are b1, i1"),
        (array(b"K\x01\x85", kind=b"M8"), "it has a dtype 'M8'; the choices are b1, i1"),
        (b"cnumpy\ndtype\nU\x02u1K\x01K\x01\x87R.", "it calls dtype with other arguments than numpy's"),
        # States that numpy does not write
        (DTYPE + b"}b.", "it sets a state of a value of type kind, or another than numpy's"),
        (DTYPE + b"}U\x0c__setstate__Nsb.", "it sets a state of a value of type kind, or another than numpy's"),
        (DTYPE + STATE + STATE + b".", "it sets a state of a value of type kind, or another than numpy's"),
        (b"}}b.", "it sets a state of a value of type dict, or another than numpy's"),
        (b"cnumpy\nndarray\n}b.", "it sets a state of ndarray, or another than numpy's"),
        (array(b"K\x02\x85", kind=b"u2", order=b"|"), "it has a dtype u2 of byte order '|'"),
        (array(b"K\x04\x85", kind=b"u1", order=b"<"), "it has a dtype u1 of byte order '<'"),
        # Shapes
        (array(b"K\x05\x85"), "it has an array of shape (5,) and type u1 with 4 bytes"),
        (array(b"K\x03\x85"), "it has an array of shape (3,) and type u1 with 4 bytes"),
        (array(b"K\x04\x85", kind=b"f8", order=b"<"), "it has an array of shape (4,) and type f8 with 4 bytes"),
        (array(b"J\xff\xff\xff\xffJ\xfc\xff\xff\xff\x86"), "whose shape is not of 0 to 8 whole numbers, 0 or more"),
        (array(b"G\x40\x10\x00\x00\x00\x00\x00\x00\x85"), "whose shape is not of 0 to 8 whole numbers, 0 or more"),
        (array(b"\x88K\x04\x86"), "whose shape is not of 0 to 8 whole numbers, 0 or more"),
        (array(b"]\x85"), "whose shape is not of 0 to 8 whole numbers, 0 or more"),
        (array(b"(" + b"K\x01" * 9 + b"t"), "whose shape is not of 0 to 8 whole numbers, 0 or more"),
        (array(integer(2**32) * 2 + b"\x86", b"C\x00"), "of shape (4294967296, 4294967296) and type u1 with 0 bytes"),
        (array(integer(2**62) + b"K\x04K\x00\x87", b"C\x00"), "(4611686018427387904, 4, 0) and type u1 with 0 bytes"),
        (array(b"K\x04\x85", kind=b"b1"), "it has an array of type b1 with other bytes than 0 and 1"),
        (array(b"K\x04\x85", b"X\x04\x00\x00\x00abcd"), "it sets a state of a value of type array, or another than"),
        # Strings and numbers
        (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"abc.", f"2 it needs {1 << 60} bytes where 4 are left"),
        (b"\x80\x05\x96" + struct.pack("<Q", (1 << 64) - 1) + b".", f"needs {(1 << 64) - 1} bytes where 1 are left"),
        (b"T\xff\xff\xff\xffabc.", "0 it needs -1 bytes where 4 are left"),
        (b"\x8b\xff\xff\xff\xffabc.", "0 it needs -1 bytes where 4 are left"),
        (b"\x8a\x0a" + b"\x01" * 10 + b".", "it has a whole number of more than 64 bits"),
        (b"\x8a\x09" + b"\x01" * 9 + b".", "it has a whole number of more than 64 bits"),
        (b"\x8b\x00\x00\x10\x00" + b"\x01" * (1 << 20) + b".", "it has a whole number of more than 64 bits"),
        (b"I" + b"9" * 5000 + b"\n.", f"it has b'{'9' * 40}' for a whole number"),
        (b"I1_0\n.", "it has b'1_0' for a whole number"),
        (b"L0x10L\n.", "it has b'0x10' for a whole number"),
        (b"F1_0.5\n.", "it has b'1_0.5' for a number"),
        (b"F\n.", "it has b'' for a number"),
        (b"S'a\n.", '''it has b"'a" for a quoted string'''),
        (b"S'\n.", '''it has b"'" for a quoted string'''),
        (b"S'\\z'\n.", "for a quoted string"),
        (b"S'\\'\n.", "for a quoted string"),
        (b"S'\\x0'\n.", "for a quoted string"),
        (b"V\\u12\n.", "it has b'\\\\u12' for a string"),
        (b"V\\ud800\n.", "it has b'\\\\ud800' for a string"),
        (b"X\x01\x00\x00\x00\xff.", "it has a string that is not UTF-8"),
        (b"X\x03\x00\x00\x00\xed\xa0\x80.", "it has a string that is not UTF-8"),
        (b"I1", "0 it has a line without an end"),
        # The memo
        (b"Nr\xff\xff\xff\x7f.", "1 it remembers a value as number 2147483647, which is taken or too large"),
        (b"Np-1\n.", "it remembers a value as number -1, which is taken or too large"),
        (b"Nq\x00q\x00.", "it remembers a value as number 0, which is taken or too large"),
        (b"h\x00.", "0 it recalls number 0, which is not there"),
        (b"q\x00.", "0 it takes a value where there is none"),
        (b"]q\x00h\x00a.", "3 it puts one list into two places"),
        (b"}q\x00U\x01ah\x00s.", "it puts one dict into two places"),
        (b")q\x00h\x00\x86.", "it puts one tuple into two places"),
        (
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87Rq\x00h\x00\x86.",
            "it recalls an array before its end",
        ),
        # The stack
        (b"", "0 it ends without STOP"),
        (b"N", "1 it ends without STOP"),
        (b".", "0 it ends with 0 values and 0 marks; there must be 1 and 0"),
        (b"NN.", "2 it ends with 2 values and 0 marks; there must be 1 and 0"),
        (b"N(.", "2 it ends with 1 values and 1 marks; there must be 1 and 0"),
        (b"N..", "1 it ends, and 1 bytes follow"),
        (b"t.", "0 it takes values up to a mark where there is none"),
        (b"N(a.", "2 it takes a value where there is none"),
        (b"]N(a.", "3 it takes a value where there is none"),
        (b"Na.", "1 it takes a value where there is none"),
        (b"NNa.", "2 it appends to None"),
        (b"NNNs.", "3 it sets 2 keys and values in None"),
        (b"}(Nu.", "3 it sets 1 keys and values in a value of type dict"),
        (b"}K\x01Ns.", "it has 1 as a key, which must be a string, and new"),
        (b"}))s.", "it has a value of type tuple as a key, which must be a string, and new"),
        (b"}(U\x01aNU\x01aNu.", "it has b'a' as a key, which must be a string, and new"),
        (b"]cnumpy\ndtype\na.", "it holds dtype as a value"),
        (DTYPE + b".", "it holds a value of type kind as a value"),
        (b"cnumpy\ndtype\n.", "it holds dtype as a value"),
        (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R.", "it holds a value of type"),
        # Headers
        (b"\x80\x06N.", "0 it has protocol 6, which must be 5 at most and come first"),
        (b"N\x80\x02.", "1 it has protocol 2, which must be 5 at most and come first"),
        (b"\x80\x04\x95" + struct.pack("<Q", 3) + b"N.", "2 it has a frame of 3 bytes where 2 are left"),
    ],
)  # fmt: skip
def test_what_is_no_plain_data(content: bytes, problem: str) -> None:
    said = message_of(lambda: read_pickle(content, "batch"))
    assert said.startswith(PLAIN) and problem in said


def laughs(depth: int) -> bytes:
    """Lists of ten times the list before."""
    return b"](" + b"U\x03lol" * 10 + b"e" + b"".join(
        b"q%c](" % i + b"h%c" % i * 10 + b"e" for i in range(depth)
    ) + b"."  # fmt: skip


@pytest.mark.parametrize(
    "content, problem",
    [
        (laughs(9), "puts one list into two places"),
        (b"]" * 10_000 + b"a" * 9_999 + b".", "holds dicts, lists or tuples more than 20 deep in one another"),
        (b"(" * 10_000 + b"t" * 10_000 + b".", "holds dicts, lists or tuples more than 20 deep in one another"),
        (b")" + b"\x85" * 90_000 + b".", "holds dicts, lists or tuples more than 20 deep in one another"),
        (b"]" * 200_000, "has more than 100000 dicts, lists and tuples"),
        (b"N" * 200_000, "has more than 123456 opcodes"),
        (
            b"\x80\x02c_codecs\nencode\nq\x00X\x00\x00\x10\x00" + b"a" * (1 << 20) + b"q\x01" +
            b"h\x00h\x01X\x06\x00\x00\x00latin1\x86R" * 10_000,
            "makes more bytes of strings than the",
        ),
    ],
    ids=["laughs", "lists", "tuples", "tuples of one", "many lists", "many values", "encoding"],
)  # fmt: skip
def test_bombs(content: bytes, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "LIMIT", 123_456)
    tracemalloc.start()
    try:
        start = time.process_time()
        assert problem in message_of(lambda: read_pickle(content, "batch"))
        assert time.process_time() - start < 60
        assert tracemalloc.get_traced_memory()[1] < 20 * len(content) + (16 << 20)
    finally:
        tracemalloc.stop()


def test_depth_that_is_still_read() -> None:
    value: Any = 7
    for _ in range(pickles.DEPTH):
        value = [value]
    assert read_pickle(pickle.dumps(value), "batch") == value
    with pytest.raises(UserError):
        read_pickle(pickle.dumps([value]), "batch")


def test_every_file_cut_short_is_refused() -> None:
    for protocol in range(6):
        content = pickle.dumps(VALUE, protocol)
        for length in range(0, len(content), 7):
            with pytest.raises(UserError):
                read_pickle(content[:length], "batch")


# TFRecords

RECORDS = [b"", b"first", bytes(range(256)) * 3, b"first"]


def crc32c(data: bytes) -> int:
    """Bit by bit, from the polynomial."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def frame(data: bytes) -> bytes:
    """A record as TensorFlow writes it."""

    def check(part: bytes) -> bytes:
        crc = crc32c(part)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % (1 << 32))

    length = struct.pack("<Q", len(data))
    return length + check(length) + data + check(data)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_records(tmp_path: Path) -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert list(read_records(written(tmp_path / "a", b"".join(map(frame, RECORDS))))) == RECORDS
    assert list(read_records(written(tmp_path / "b", b""))) == []


def test_records_of_tensorflow() -> None:
    """readers/make.py wrote them."""
    first, second, third = [read_example(record, "x") for record in read_records(FIXTURES / "tensorflow.tfrecord")]
    (png,) = first.pop("image")
    assert isinstance(png, bytes) and first == {} and third == {}
    with Image.open(io.BytesIO(png)) as image:
        np.testing.assert_array_equal(np.asarray(image), (np.arange(18) * 13 % 256).reshape(2, 3, 3))
    assert same(
        dict(sorted(second.items())),
        {
            "bytes": [b"", b"\x00\xff", b"two" * 50],
            "café": [7],
            "empty list": [],
            "floats": [1.5, -2.25, math.inf, float(np.float32(0.1))],
            "ints": [0, 1, -1, 300, 2**63 - 1, -(2**63)],
            "nothing": [],
        },
    )


def test_records_that_are_damaged(tmp_path: Path) -> None:
    parts = [frame(record) for record in RECORDS]
    content, start = b"".join(parts), len(parts[0]) + len(parts[1])
    where = f"record 2 of {tmp_path / 'a'}, at byte {start}, "

    def said(content: bytes) -> tuple[list[bytes], str]:
        got = []
        with pytest.raises(UserError) as caught:
            got += list(iterate(read_records(written(tmp_path / "a", content)), got))
        assert "\n" not in str(caught.value)
        return got, str(caught.value)

    def iterate(records: Iterator[bytes], got: list[bytes]) -> Iterator[bytes]:
        for record in records:
            got.append(record)
        yield from ()

    def changed(at: int) -> bytes:
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    for at, problem in (
        (start, "has a length whose checksum is wrong: no TFRecord file, or damaged"),
        (start + 8, "has a length whose checksum is wrong: no TFRecord file, or damaged"),
        (start + 12, "has data whose checksum is wrong: damaged"),
        (start + 12 + 768, "has data whose checksum is wrong: damaged"),
    ):
        assert said(changed(at)) == (RECORDS[:2], where + problem)
    assert said(content[: start + 5])[1] == where + "is cut short: it begins with 12 bytes, got 5"
    assert said(content[: start + 14])[1] == where + "is cut short: 772 bytes must follow, got 2"
    assert said(content[: start + 12 + 771])[1] == where + "is cut short: 772 bytes must follow, got 771"
    huge = struct.pack("<Q", 1 << 60)
    assert said(huge + frame(huge)[20:] + b"abc")[1].endswith(f"is cut short: {(1 << 60) + 4} bytes must follow, got 3")


def test_records_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = message_of(lambda: list(read_records(tmp_path / "none")))
    assert said == f"{tmp_path / 'none'} must be a TFRecord file; it cannot be read: No such file or directory"
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    said = message_of(lambda: read_records(tmp_path / "none"))
    assert said == "TFRecord files need google-crc32c; `pip install 'nelbo[data]'` brings it"


def varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def example(*entries: bytes) -> bytes:
    return field(1, b"".join(field(1, entry) for entry in entries))


def entry(name: bytes, kind: int, values: bytes) -> bytes:
    return field(1, name) + field(2, field(kind, values))


def test_examples_packed_and_not() -> None:
    packed = field(1, varint(5) + varint(2**64 - 2)) + field(1, 300)
    floats = field(1, struct.pack("<2f", 0.5, -1)) + b"\x0d" + struct.pack("<f", 8)
    got = read_example(
        example(
            entry(b"ints", 3, field(1, 5) + field(1, 2**64 - 2)), entry(b"mixed", 3, packed), entry(b"f", 2, floats),
            entry(b"b", 1, field(1, b"x") + field(1, b"")), field(2, field(3, field(1, 1))),
            entry(b"b", 3, field(1, 9)),
        ),
        "x",
    )  # fmt: skip
    assert same(got, {"ints": [5, -2], "mixed": [5, -2, 300], "f": [0.5, -1.0, 8.0], "b": [9], "": [1]})


@pytest.mark.parametrize(
    "record, problem",
    [
        (b"\x0a", "has a number that does not end, or is of more than 64 bits"),
        (b"\x0a\x05abc", "has a field 1 of 5 bytes where 3 are left"),
        (field(1, field(1, field(2, b""))) + b"\x0a" + varint(2**63), f"a field 1 of {2**63} bytes where 0 are left"),
        (b"\x0a" + b"\xff" * 9 + b"\x02", "has a number that does not end, or is of more than 64 bits"),
        (b"\x0a" + b"\x80" * 10 + b"\x00", "has a number that does not end, or is of more than 64 bits"),
        (field(2, b""), "has field 2 of wire type 2 in Example"),
        (field(1, 5), "has field 1 of wire type 0 in Example"),
        (b"\x02\x00", "has a field 0 of 0 bytes where 0 are left"),
        (b"\x0b", "has wire type 3"),
        (field(1, field(2, b"")), "has field 2 of wire type 2 in Features"),
        (example(field(3, b"")), "has field 3 of wire type 2 in a feature's entry"),
        (example(field(1, b"\xff")), "has a feature's name that is not UTF-8"),
        (example(field(2, field(4, b""))), "has a feature of fields 4; it must be of 1, 2 or 3"),
        (example(field(2, field(1, b"") + field(3, b""))), "has a feature of fields 1, 3; it must be of 1, 2 or 3"),
        (example(entry(b"a", 1, field(1, 3))), "has field 1 of wire type 0 in BytesList"),
        (example(entry(b"a", 2, field(1, b"abc"))), "has field 1 of wire type 2 and 3 bytes in FloatList"),
        (example(entry(b"a", 2, b"\x09" + bytes(8))), "has field 1 of wire type 1 and 8 bytes in FloatList"),
        (example(entry(b"a", 3, b"\x0d" + bytes(4))), "has field 1 of wire type 5 in Int64List"),
        (example(entry(b"a", 3, field(1, b"\x80"))), "has a number that does not end, or is of more than 64 bits"),
    ],
)
def test_what_is_no_example(record: bytes, problem: str) -> None:
    said = message_of(lambda: read_example(record, "record 3"))
    assert said.startswith("record 3 must be a tf.train.Example; it ") and problem in said


# IDX

IMAGES, LABELS = np.arange(60, dtype=np.uint8).reshape(5, 4, 3) * 3, np.array([3, 1, 4, 1, 5], np.uint8)


def idx(values: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("values", [IMAGES, LABELS])
def test_idx(tmp_path: Path, values: np.ndarray, packed: bool) -> None:
    content = idx(values)
    got = read_idx(written(tmp_path / "a.gz", gzip.compress(content) if packed else content))
    assert same(got, values) and got.flags.writeable


@pytest.mark.skipif(not FASHION.is_dir(), reason="Fashion-MNIST is not there")
def test_idx_of_fashion_mnist() -> None:
    labels, images = (read_idx(FASHION / f"t10k-{name}-ubyte.gz") for name in ("labels-idx1", "images-idx3"))
    assert images.shape == (10000, 28, 28) and (np.bincount(labels) == 1000).all()
    assert labels[:4].tolist() == [9, 2, 1, 1] and int(images.sum(dtype=np.int64)) == 573_469_082


def damaged_gzip(content: bytes) -> bytes:
    packed = bytearray(gzip.compress(content, mtime=0))
    packed[-8] ^= 1  # of the checksum
    return bytes(packed)


BEGIN = "{} must be an IDX file of bytes with 1 or 3 axes, and begin with 00000801 or 00000803; it begins with "
DAMAGED = "{} must be an IDX file, raw or in gzip; its gzip is damaged: "
GOOD = idx(IMAGES)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", BEGIN + "nothing"),
        (b"\x00\x00", BEGIN + "0000"),
        (b"\x89PNG\r\n", BEGIN + "89504e47"),
        (b"\0\0\x0d\x03" + GOOD[4:], BEGIN + "00000d03"),
        (b"\0\0\x08\x02" + GOOD[4:], BEGIN + "00000802"),
        (gzip.compress(b"tar", mtime=0), BEGIN + "746172"),
        (GOOD[:10], "{} is cut short: 3 sizes of axes must follow, got 6 bytes"),
        (GOOD[:-1], "{} must hold 60 values for its shape (5, 4, 3), got 59"),
        (GOOD + b"\0", "{} must hold 60 values for its shape (5, 4, 3), got more"),
        (gzip.compress(GOOD[:-1], mtime=0), "{} must hold 60 values for its shape (5, 4, 3), got 59"),
        (gzip.compress(GOOD + b"\0", mtime=0), "{} must hold 60 values for its shape (5, 4, 3), got more"),
        (b"\0\0\x08\x01" + bytes(4), "{} must hold at least 1 value, got shape (0,)"),
        (b"\0\0\x08\x03" + bytes(4) + b"\xff" * 8, "{} must hold at least 1 value, got shape (0, 4294967295, 429"),
        (b"\0\0\x08\x01\xff\xff\xff\xffa", "{} says that it holds 4294967295 values, more than it can; 9 at most"),
        (
            b"\0\0\x08\x03" + b"\xff" * 12 + b"a",
            f"{{}} says that it holds {(2**32 - 1) ** 3} values, more than it can; 17 at most",
        ),
        (
            gzip.compress(b"\0\0\x08\x01\xff\xff\xff\xffa", mtime=0),
            f"{{}} says that it holds 4294967295 values, more than it can; {1040 * 27} at most",
        ),
        (damaged_gzip(GOOD), DAMAGED + "CRC check failed "),
        (gzip.compress(GOOD, mtime=0)[:-9], DAMAGED + "Compressed file ended"),
        (gzip.compress(GOOD, mtime=0)[:10] + b"\xff" * 9, DAMAGED + "Error -3"),
        (gzip.compress(GOOD, mtime=0) + b"more", DAMAGED + "Not a gzipped file"),
    ],
)  # fmt: skip
def test_idx_that_is_damaged(tmp_path: Path, content: bytes, message: str) -> None:
    path = written(tmp_path / "a", content)
    assert message_of(lambda: read_idx(path)).startswith(message.format(path))


def test_idx_that_is_not_there(tmp_path: Path) -> None:
    for name, problem in (("none", "No such file or directory"), (".", "Is a directory")):
        said = message_of(lambda name=name: read_idx(tmp_path / name))
        assert said == f"{tmp_path / name} must be an IDX file; it cannot be read: {problem}"


def test_a_gzip_bomb_is_inflated_no_further_than_it_says(tmp_path: Path) -> None:
    path = written(tmp_path / "a", gzip.compress(idx(LABELS) + bytes(256 << 20), 9))
    tracemalloc.start()
    try:
        assert message_of(lambda: read_idx(path)) == f"{path} must hold 5 values for its shape (5,), got more"
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


# Fuzzing


class Watch:
    """Limits of processor time and memory over all files, and that no warning gets out."""

    def __init__(self, seconds: float, mebibytes: float) -> None:
        self.seconds, self.bytes, self.slowest = seconds, mebibytes * 2**20, 0.0

    def __enter__(self) -> "Watch":
        self.caught = warnings.catch_warnings()
        self.caught.__enter__()
        warnings.simplefilter("error")
        tracemalloc.start()
        self.start = time.process_time()
        return self

    def read(self, read: Callable[[], Any]) -> Any:
        """The value, or the UserError; anything else is raised."""
        start = time.process_time()
        try:
            return read()
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
            return error
        finally:
            self.slowest = max(self.slowest, time.process_time() - start)

    def __exit__(self, kind: Any, *rest: Any) -> None:
        taken, peak = time.process_time() - self.start, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        self.caught.__exit__(kind, *rest)
        if kind is None:
            assert taken < self.seconds and peak < self.bytes and self.slowest < self.seconds / 20


@contextmanager
def rewritten(path: Path) -> Iterator[Callable[[bytes], None]]:
    """A function that writes a file over; opening it again each time would wait for the disk."""
    with path.open("wb", buffering=0) as file:

        def write(content: bytes) -> None:
            file.seek(0)
            file.write(content)
            file.truncate()

        yield write


def opcodes(content: bytes) -> list[bytes]:
    """A pickle cut at its opcodes; one that pickletools cannot read, at its lines."""
    try:
        starts = [position for _, _, position in pickletools.genops(content)]
    except ValueError:
        return content.splitlines(keepends=True)
    return [content[i:j] for i, j in zip(starts, [*starts[1:], None], strict=True)]


def pickle_files() -> list[list[bytes]]:
    small = {
        "data": ARRAYS["images"],
        "T": ARRAYS["axes"],
        "labels": [1, 300, -1],
        "f": [0.5, (None, True)],
        "b": b"\xff",
    }
    made = [pickle.dumps(small, protocol) for protocol in range(6)]
    made += [(FIXTURES / f"python2-{protocol}.pkl").read_bytes() for protocol in range(3)]
    made.append(array(b"K\x02\x85", kind=b"u2", order=b"<"))
    return [opcodes(content) for content in made]


WORDS = [
    *(opcode.code.encode("latin-1") for opcode in pickletools.opcodes),
    *(b"h%c" % i for i in range(8)), *(b"q%c" % i for i in range(8)), b"cposix\nsystem\n", b"cnumpy\nload\n",
    b"cnumpy\ndtype\n", DTYPE, DTYPE + STATE, array(b"K\x04\x85")[2:-1], b"]q\x01", b"K\x00\x85", b"(K\x01K\x02t",
    integer(2**63 - 1), b"J\xff\xff\xff\xff", b"K\x00", b"I99999999999999999999\n", b"Fnan\n", b"S'\\", b"U\x02O8",
    b"U\x02b1", b"U\x02f8", b"X\x01\x00\x00\x00K", b"B\xff\xff\xff\x7f", b"r\xff\xff\xff\x7f",
    b"\x8e" + struct.pack("<Q", 1 << 60),
]  # fmt: skip


class Restricted(pickle.Unpickler):
    """Python's own reader; it may name what ours knows."""

    def find_class(self, module: str, name: str) -> Any:
        assert (module, name) in pickles.NAMES or module.startswith(("numpy", "_codecs", "builtins"))
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def as_python(value: Any) -> Any:
    """A value of Python's own reader as ours makes it."""
    if isinstance(value, np.ndarray):
        return value.astype(value.dtype.newbyteorder("="))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, list | tuple):
        return type(value)(as_python(part) for part in value)
    return {key: as_python(part) for key, part in value.items()} if isinstance(value, dict) else value


def plain(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return type(value) is np.ndarray and value.dtype.kind in "biuf" and value.dtype.isnative
    if type(value) is dict:
        return all(type(key) in (str, bytes) and plain(part) for key, part in value.items())
    if type(value) in (list, tuple):
        return all(map(plain, value))
    return type(value) in (str, bytes, int, float, bool, type(None))


def test_fuzzed_pickles() -> None:
    accepted = []
    with Watch(seconds=40, mebibytes=8) as watch:
        for content in mutants(pickle_files(), MUTANTS, seed=1, words=WORDS):
            got = watch.read(lambda content=content: read_pickle(content, "batch"))
            if not isinstance(got, UserError):
                assert plain(got)
                if len(accepted) < 2000:
                    accepted.append((content, got))
    assert len(accepted) > 1000  # enough of them are changes that leave a pickle
    agreed = 0
    for content, got in accepted:
        try:
            expected = Restricted(io.BytesIO(content), encoding="bytes").load()
        except Exception:
            continue  # frames that do not fit
        agreed += 1
        assert same(got, as_python(expected)), content
    assert agreed > 0.9 * len(accepted)


def test_fuzzed_records(tmp_path: Path) -> None:
    """A file is read to its end only if it is whole records of the file that it was, and no other record is seen."""
    files = [
        [part for data in [*RECORDS[:2], b"third"] for part in pieces_of(frame(data))],
        [part for data in (b"a" * 40, b"", b"\x00" * 9) for part in pieces_of(frame(data))],
    ]
    # No record has 8 bytes: the length of another and its checksum would do for its data.
    originals = {data: frame(data) for data in (*RECORDS[:2], b"third", b"a" * 40, b"\x00" * 9)}
    whole, path = 0, tmp_path / "a"
    with Watch(seconds=40, mebibytes=8) as watch, rewritten(path) as write:
        for content in mutants(files, MUTANTS, seed=2):
            write(content)
            seen: list[bytes] = []
            got = watch.read(lambda seen=seen: seen.extend(read_records(path)))
            assert content.startswith(b"".join(originals[data] for data in seen))
            if got is None:
                assert content == b"".join(originals[data] for data in seen)
                whole += 1
    assert MUTANTS / 20 < whole < MUTANTS / 2  # those that changed nothing, or moved or cut records


def pieces_of(record: bytes) -> list[bytes]:
    return [record[:8], record[8:12], record[12:-4], record[-4:]]


def test_fuzzed_examples() -> None:
    real = list(read_records(FIXTURES / "tensorflow.tfrecord"))
    made = [
        varint(10), varint(60), varint(10), varint(20), field(1, b"ints"), b"\x12", b"\x0c", b"\x1a\x0a", field(1, 5),
        field(1, 2**64 - 2), b"\x0a", varint(36), field(1, b"floats"), b"\x12", b"\x1a", b"\x12\x18",
        field(1, bytes(8)),
        b"\x0d\x00\x00\x80\x3f", b"\x0a\x05",
    ]  # fmt: skip
    kinds = {bytes, float, int}
    accepted = 0
    with Watch(seconds=40, mebibytes=8) as watch:
        files = [[bytes([byte]) for byte in record] for record in real] + [made]
        for content in mutants(files, MUTANTS, seed=3):
            got = watch.read(lambda content=content: read_example(content, "x"))
            if not isinstance(got, UserError):
                accepted += 1
                for name, values in got.items():
                    assert type(name) is str and type(values) is list
                    assert len({type(value) for value in values} | {None}) <= 2
                    assert {type(value) for value in values} <= kinds
    assert accepted > 1000


def test_fuzzed_idx(tmp_path: Path) -> None:
    raw = [[values[:4], *(values[i : i + 4] for i in range(4, 4 + 4 * n, 4)), values[4 + 4 * n :]]
           for values, n in ((idx(IMAGES), 3), (idx(LABELS), 1))]  # fmt: skip
    packed = [[file[:3], file[3:10], file[10:-8], file[-8:-4], file[-4:]]
              for file in (gzip.compress(idx(IMAGES), mtime=0), gzip.compress(idx(LABELS), mtime=0))]  # fmt: skip
    accepted, path = 0, tmp_path / "a"
    with Watch(seconds=40, mebibytes=8) as watch, rewritten(path) as write:
        for content in mutants(raw + packed, MUTANTS, seed=4):
            write(content)
            got = watch.read(lambda: read_idx(path))
            if not isinstance(got, UserError):
                accepted += 1
                assert got.dtype == np.uint8 and idx(got) == (
                    gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
                )
    assert accepted > 1000
