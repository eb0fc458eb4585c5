"""Official archives (stand-ins of them, in their formats), preparing, the hub's data sets, and ``nelbo data``.

The stand-ins are small and so not the published files: they are read as --unofficial ones, or with their own checksums
and counts in the table's place.
"""

import gzip
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import nelbo
from nelbo import cli
from nelbo.data import load, official, prepared
from nelbo.data.dataset import content_hash, cut_rows
from nelbo.data.files import Resize, file_plan
from nelbo.data.loader import Batches, shuffled
from nelbo.data.official import OFFICIAL
from nelbo.data.prepared import Piece, Plan, open_prepared, prepare, verify
from nelbo.data.sources import named_folder, plan
from nelbo.errors import UserError
from test_readers import frame

RNG = np.random.default_rng(0)


def colours(count: int, size: int = 32) -> np.ndarray:
    return RNG.integers(0, 256, (count, 3, size, size), np.uint8)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as found:
        call()
    assert "\n" not in str(found.value)
    return str(found.value)


def ready(source: str, files: Path, out: Path, **options: object) -> prepared.Dataset:
    return open_prepared(prepare(plan(source, files, True, **options), out, workers=1))  # type: ignore[arg-type]


# Official archives ---------------------------------------------------------------------------------------------------

BATCHES = [(colours(8), RNG.integers(0, 10, 8)) for _ in range(6)]
NAMES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def cifar_pickle(i: int) -> bytes:
    images, labels = BATCHES[i]
    label = f"training batch {i + 1} of 5" if i < 5 else "testing batch 1 of 1"
    table = {b"data": images.reshape(8, -1), b"labels": labels.tolist(), b"batch_label": label.encode()}
    return pickle.dumps(table, protocol=2)


def cifar_folder(folder: Path, kind: str) -> Path:
    folder.mkdir()
    if kind.startswith("python"):
        contents = {name: cifar_pickle(i) for i, name in enumerate(NAMES)}
    else:
        contents = {
            f"{name}.bin": np.concatenate((y[:, None].astype(np.uint8), x.reshape(8, -1)), 1).tobytes()
            for name, (x, y) in zip(NAMES, BATCHES, strict=True)
        }
    inner = f"cifar-10-batches-{'py' if kind.startswith('python') else 'bin'}"
    if kind.endswith("unpacked"):
        (folder / inner).mkdir()
        for name, content in contents.items():
            (folder / inner / name).write_bytes(content)
    else:
        with tarfile.open(folder / f"cifar-10-{kind}.tar.gz", "w:gz") as archive:
            for name, content in contents.items():
                add(archive, f"{inner}/{name}", content)
    return folder


@pytest.mark.parametrize("kind", ["python", "python, unpacked", "binary", "binary, unpacked"])
def test_cifar10(tmp_path: Path, kind: str) -> None:
    found = ready("cifar10", cifar_folder(tmp_path / "files", kind), tmp_path / "set")
    train = np.concatenate([x for x, _ in BATCHES[:5]])
    labels = np.concatenate([y for _, y in BATCHES[:5]])
    rows = cut_rows(40, {"validation": 4})
    for split in ("train", "validation"):
        np.testing.assert_array_equal(found.images[split], train[rows[split]])
        np.testing.assert_array_equal(found.labels[split], labels[rows[split]])  # type: ignore[index]
    np.testing.assert_array_equal(found.images["test"], BATCHES[5][0])
    assert found.name == "cifar10-unofficial" and found.levels == 256 and found.classes == 10
    assert found.version == content_hash(found.images, 256)
    assert isinstance(found.images["train"], np.memmap)
    record = json.loads((tmp_path / "set" / "dataset.json").read_text())
    assert record["origin"]["kit"] == kind


def test_cifar10_that_is_not_what_it_says(tmp_path: Path) -> None:
    folder = cifar_folder(tmp_path / "files", "python, unpacked")
    inner = folder / "cifar-10-batches-py"
    md5 = hashlib.md5((inner / "data_batch_1").read_bytes()).hexdigest()
    assert message_of(lambda: plan("cifar10", folder)) == (
        f"{inner / 'data_batch_1'} is not the published file of cifar10: md5:{md5}, not "
        "md5:c99cafc152244af753f735de768cd75f; it is cut short or changed (to take it as it is: --unofficial)"
    )
    shutil.copy(inner / "data_batch_3", inner / "data_batch_2")
    assert message_of(lambda: ready("cifar10", folder, tmp_path / "set")) == (
        f"{inner / 'data_batch_2'} must be 'training batch 2 of 5', got 'training batch 3 of 5': another batch's "
        "content"
    )
    whole = cifar_pickle(1)
    (inner / "data_batch_2").write_bytes(whole[:-40])
    assert "data_batch_2" in message_of(lambda: ready("cifar10", folder, tmp_path / "set"))
    (inner / "data_batch_2").write_bytes(whole)
    assert len(ready("cifar10", folder, tmp_path / "set").images["train"]) == 36  # what was read before is kept
    (inner / "test_batch").unlink()
    message = message_of(lambda: plan("cifar10", folder))
    assert message.startswith("cifar10 needs cifar-10-python.tar.gz; or data_batch_1 to test_batch; or cifar-10-binary")
    assert message.endswith("(another folder: nelbo data cifar10 --files FOLDER)")


@pytest.mark.parametrize("at", [0.5, 0.98])
def test_an_archive_that_is_cut_short(tmp_path: Path, at: float) -> None:
    path = cifar_folder(tmp_path / "files", "python") / "cifar-10-python.tar.gz"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * at)])
    message = message_of(lambda: ready("cifar10", path.parent, tmp_path / "set"))
    assert str(path) in message and ("cut short or damaged" in message or "holds no" in message)
    assert not (tmp_path / "set").exists()


def test_published_checksums_and_counts_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cifar_folder(tmp_path / "files", "binary")
    path = folder / "cifar-10-binary.tar.gz"
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    kits = {"binary": (official.File(path.name, f"md5:{md5}"),)}
    known = replace(OFFICIAL["cifar10"], kits=kits, counts={"train": 40, "test": 8}, cut={"validation": 5})
    monkeypatch.setitem(OFFICIAL, "cifar10", known)
    found = open_prepared(prepare(plan("cifar10", folder), tmp_path / "set", workers=2))
    assert found.name == "cifar10" and [len(found.images[s]) for s in ("train", "validation", "test")] == [35, 5, 8]
    monkeypatch.setitem(OFFICIAL, "cifar10", replace(known, counts={"train": 41, "test": 8}))
    assert message_of(lambda: prepare(plan("cifar10", folder), tmp_path / "other", workers=1)) == (
        "cifar10 must have 41 train images, got 40"
    )
    assert not (tmp_path / "other").exists()


FASHION = [(RNG.integers(0, 256, (n, 28, 28), np.uint8), RNG.integers(0, 10, n).astype(np.uint8)) for n in (30, 10)]


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def test_fashion_mnist_packed_by_whatever_gzip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{a}-{b}-ubyte.gz" for a in ("train", "t10k") for b in ("images-idx3", "labels-idx1")]
    contents = [idx(values) for pair in FASHION for values in pair]
    for name, content in zip(names, contents, strict=True):
        (tmp_path / name).write_bytes(gzip.compress(content, 1))
    files = tuple(
        official.File(name, "md5:0", None, hashlib.md5(content).hexdigest())
        for name, content in zip(names, contents, strict=True)
    )
    known = replace(
        OFFICIAL["fashion-mnist"], kits={"idx": files}, counts={"train": 30, "test": 10}, cut={"validation": 3}
    )
    monkeypatch.setitem(OFFICIAL, "fashion-mnist", known)
    found = open_prepared(prepare(plan("fashion-mnist", tmp_path), tmp_path / "set", workers=1))
    rows = cut_rows(30, {"validation": 3})
    np.testing.assert_array_equal(found.images["train"][:, 0], FASHION[0][0][rows["train"]])
    np.testing.assert_array_equal(found.labels["test"], FASHION[1][1])  # type: ignore[index]
    (tmp_path / names[0]).unlink()
    (tmp_path / names[0].removesuffix(".gz")).write_bytes(contents[0])  # unpacked
    again = open_prepared(prepare(plan("fashion-mnist", tmp_path), tmp_path / "again", workers=1))
    assert again.version == found.version
    (tmp_path / names[1]).write_bytes(gzip.compress(contents[1][:-1] + b"\0", 1))
    assert "is not the published file" in message_of(lambda: plan("fashion-mnist", tmp_path))


@pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").is_dir(), reason="needs Debian's package dataset-fashion-mnist"
)
def test_the_real_fashion_mnist(tmp_path: Path) -> None:
    found = open_prepared(prepare(plan("fashion-mnist", Path("/usr/share/datasets/fashion-mnist")), tmp_path / "set"))
    assert (found.name, found.version, found.shape) == ("fashion-mnist", "be8f92793dd8", (1, 28, 28))
    assert [len(found.images[s]) for s in ("train", "validation", "test")] == [55_000, 5000, 10_000]
    assert np.bincount(found.labels["test"]).tolist() == [1000] * 10  # type: ignore[index]
    assert abs(float(np.concatenate([found.images["train"], found.images["validation"]]).mean()) - 72.9404) < 1e-4


def test_published_shapes_are_held(tmp_path: Path) -> None:
    for part, count in (("train", 30), ("t10k", 10)):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(np.zeros((count, 8, 8), np.uint8)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.zeros(count, np.uint8)))
    message = message_of(lambda: ready("fashion-mnist", tmp_path, tmp_path / "set"))
    assert message == "images of fashion-mnist-unofficial must be (C, H, W) = (1, 28, 28), got (1, 8, 8)"


IMAGENET = [(colours(3), RNG.integers(1, 1001, 3)) for _ in range(11)]
PARTS = [f"train_data_batch_{i}" for i in range(1, 11)] + ["val_data"]


@pytest.mark.parametrize("kind", ["batches", "zip of batches", "npz"])
def test_imagenet32_new(tmp_path: Path, kind: str) -> None:
    tables = {
        name: {"data": x.reshape(3, -1), "labels": y.tolist(), "mean": x.reshape(3, -1).mean(0)}
        for name, (x, y) in zip(PARTS, IMAGENET, strict=True)
    }
    files: dict[str, bytes] = {}
    for name, table in tables.items():
        if kind == "npz":
            file = io.BytesIO()
            np.savez(file, **{key: np.asarray(value) for key, value in table.items()})
            files[f"{name}.npz"] = file.getvalue()
        else:
            files[name] = pickle.dumps(table, protocol=3)
    if kind == "batches":
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
    else:
        suffix = "_npz" if kind == "npz" else ""
        for part in ("train", "val"):
            with zipfile.ZipFile(tmp_path / f"Imagenet32_{part}{suffix}.zip", "w") as archive:
                for name in reversed(files):  # the order in the zip does not matter
                    if name.startswith(part):
                        archive.writestr(name, files[name])
    found = ready("imagenet32-new", tmp_path, tmp_path / "set")
    train = np.concatenate([x for x, _ in IMAGENET[:10]])
    rows = cut_rows(30, {"validation": 3})
    np.testing.assert_array_equal(found.images["train"], train[rows["train"]])
    np.testing.assert_array_equal(found.images["test"], IMAGENET[10][0])
    np.testing.assert_array_equal(found.labels["test"], IMAGENET[10][1] - 1)  # type: ignore[index]


PICTURES = {"train": colours(12), "valid": colours(4)}


def old_tar(folder: Path, size: int = 32, pictures: dict[str, np.ndarray] = PICTURES) -> None:
    for part, images in pictures.items():
        with tarfile.open(folder / f"{part}_{size}x{size}.tar", "w") as archive:
            entry = tarfile.TarInfo(f"{part}_{size}x{size}")
            entry.type = tarfile.DIRTYPE
            archive.addfile(entry)
            for i, image in enumerate(images):
                add(archive, f"{part}_{size}x{size}/{i:05d}.png", png(image))


def old_records(folder: Path) -> None:
    def example(content: bytes) -> bytes:
        def message(field: int, value: bytes) -> bytes:
            size, length = len(value), b""
            while size > 127:
                length += bytes([size & 127 | 128])
                size >>= 7
            return bytes([field << 3 | 2]) + length + bytes([size]) + value

        feature = message(1, message(1, content))
        return message(1, message(1, message(1, b"image") + message(2, feature)))

    for part, name, shards in (("train", "train", 3), ("valid", "validation", 1)):
        for i in range(shards):
            chunk = np.array_split(PICTURES[part], shards)[i]
            path = folder / f"downsampled_imagenet-{name}.tfrecord-{i:05d}-of-{shards:05d}"
            path.write_bytes(b"".join(frame(example(png(image))) for image in chunk))


@pytest.mark.parametrize("write", [old_tar, old_records])
def test_imagenet32_old(tmp_path: Path, write: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nelbo.data.archives.PICTURES", 5)  # three pieces
    write(tmp_path)
    found = ready("imagenet32-old", tmp_path, tmp_path / "set")
    rows = cut_rows(12, {"validation": 1})
    np.testing.assert_array_equal(found.images["train"], PICTURES["train"][rows["train"]])
    np.testing.assert_array_equal(found.images["test"], PICTURES["valid"])
    assert found.labels is None and "old version" in found.description


def test_imagenet64_and_pictures_of_another_size(tmp_path: Path) -> None:
    old_tar(tmp_path, 64, {part: colours(3, 64) for part in PICTURES})
    assert ready("imagenet64", tmp_path, tmp_path / "set").shape == (3, 64, 64)
    old_tar(tmp_path, 32, {part: colours(3, 64) for part in PICTURES})
    assert message_of(lambda: ready("imagenet32-old", tmp_path, tmp_path / "other")).endswith(
        "must be 32x32, got 64x64"
    )


def test_damaged_pictures(tmp_path: Path) -> None:
    old_tar(tmp_path)
    path = tmp_path / "train_32x32.tar"
    content = path.read_bytes()

    def reading() -> str:
        return message_of(lambda: ready("imagenet32-old", tmp_path, tmp_path / "set"))

    path.write_bytes(content[:9100])
    assert reading() == f"{path} is cut short or damaged: no header of a tar at byte 8704"
    path.write_bytes(content[:10000])
    assert reading().startswith(f"{path} is cut short: a file of ")
    path.write_bytes(content[: 512 * 4])
    assert reading().startswith(f"{path} is cut short")
    path.write_bytes(content[:530] + b"!" + content[531:])  # in a header
    assert reading() == f"{path} is cut short or damaged: no header of a tar at byte 512"
    path.write_bytes(content[:1100] + b"\0\0\0\0" + content[1104:])  # in a picture
    assert reading().startswith(f"cannot take the image the picture at byte 1024 of {path}")
    for part in PICTURES:
        (tmp_path / f"{part}_32x32.tar").unlink()
    old_records(tmp_path)
    (tmp_path / "downsampled_imagenet-train.tfrecord-00001-of-00003").unlink()
    assert reading().endswith(
        "must hold every file that downsampled_imagenet-train.tfrecord-00000-of-00003 belongs to, got 2"
    )


def test_what_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NELBO_DATA", str(tmp_path))
    files = (official.File("cifar-10-binary.tar.gz", "md5:0", "http://127.0.0.1:9/cifar-10-binary.tar.gz"),)
    monkeypatch.setitem(OFFICIAL, "cifar10", replace(OFFICIAL["cifar10"], kits={"binary": files}))
    message = message_of(lambda: load("cifar10"))
    assert message.startswith("cifar10 is not here and cannot be fetched: http://127.0.0.1:9/cifar-10-binary.tar.gz: ")
    assert message.endswith(f"put cifar-10-binary.tar.gz into {tmp_path}/raw/cifar10, or name its folder: nelbo data "
                            "cifar10 --files FOLDER")  # fmt: skip
    assert list((tmp_path / "raw" / "cifar10").iterdir()) == []
    assert "image-net.org/small no longer has it" in message_of(lambda: load("imagenet32-old"))


def test_what_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = cifar_folder(tmp_path / "files", "binary") / "cifar-10-binary.tar.gz"
    md5 = hashlib.md5(source.read_bytes()).hexdigest()
    files = (official.File(source.name, f"md5:{md5}", source.as_uri()),)
    known = replace(OFFICIAL["cifar10"], kits={"binary": files}, counts={"train": 40, "test": 8}, cut={"validation": 5})
    monkeypatch.setitem(OFFICIAL, "cifar10", known)
    monkeypatch.setenv("NELBO_DATA", str(tmp_path / "data"))
    found = load("cifar10")
    np.testing.assert_array_equal(found.images["test"], BATCHES[5][0])
    source.unlink()
    shutil.rmtree(tmp_path / "data" / "raw")
    assert load("cifar10").version == found.version  # mapped, not read again
    assert named_folder("cifar10") == tmp_path / "data" / "cifar10"


# Preparing -----------------------------------------------------------------------------------------------------------


def numbers(start: int, stop: int, wait: float = 0.0) -> prepared.Images:
    """Images whose pixels are their number, mod 256."""
    time.sleep(wait)
    values = np.arange(start, stop)
    return np.tile(values[:, None, None, None].astype(np.uint8), (1, 1, 4, 4)), values


def numbered(count: int = 1000, piece: int = 90, wait: float = 0.0, **changes: object) -> Plan:
    pieces = tuple(
        Piece("train", f"from {i}", partial(numbers, i, min(i + piece, count), wait)) for i in range(0, count, piece)
    )
    return replace(Plan("numbers", pieces, 256, "numbers", origin={"wait": 0}), **changes)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npy"))}


def test_one_process_and_two_write_the_same(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    one = prepare(numbered(), tmp_path / "one", 1, lambda done, total: seen.append((done, total)))
    assert seen == [(i, 12) for i in range(13)]
    two = prepare(numbered(), tmp_path / "two", 2)
    assert contents(one) == contents(two)
    found, rows = open_prepared(one), cut_rows(1000, {"validation": 100, "test": 100})
    for split, values in rows.items():
        np.testing.assert_array_equal(found.labels[split], values)  # type: ignore[index]
        np.testing.assert_array_equal(found.images[split][:, 0, 3, 1], values % 256)
    assert verify(one)["version"] == found.version == content_hash(found.images, 256)
    assert sorted(p.name for p in one.iterdir()) == ["dataset.json", *contents(one)]
    assert not (tmp_path / "one.part").exists()
    assert prepare(numbered(), one) == one  # done already


KILLED = """
import sys; sys.path.insert(0, "tests")
from pathlib import Path
from nelbo.data.prepared import prepare
from test_prepared import numbered
prepare(numbered(wait=float(sys.argv[2])), Path(sys.argv[1]), int(sys.argv[3]), lambda *seen: print(*seen, flush=True))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_time_it_goes_on(tmp_path: Path, workers: int) -> None:
    expected = contents(prepare(numbered(), tmp_path / "whole", 1))
    out, root = tmp_path / "set", Path(__file__).parent.parent
    for after in (2, 5, 9):
        command = [sys.executable, "-c", KILLED, str(out), "0.05", str(workers)]
        life = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, start_new_session=True)
        assert life.stdout is not None
        for line in life.stdout:
            if int(line.split()[0]) >= after:
                break
        os.killpg(life.pid, signal.SIGKILL)
        life.communicate()
        assert not out.exists()
    seen: list[tuple[int, int]] = []
    prepare(numbered(), out, 1, lambda done, total: seen.append((done, total)))
    assert seen[0][0] >= 9 - workers  # what was complete was not read again
    assert contents(out) == expected and not (tmp_path / "set.part").exists()
    verify(out)


def failing(after: int) -> prepared.Images:
    raise UserError("the source is damaged")


def test_a_piece_that_fails_leaves_nothing_half_written(tmp_path: Path) -> None:
    good = numbered()
    bad = replace(good, pieces=(*good.pieces[:5], Piece("train", "bad", partial(failing, 1)), *good.pieces[6:]))
    for workers in (1, 2):
        assert message_of(lambda w=workers: prepare(bad, tmp_path / "set", w)) == "the source is damaged"  # type: ignore[misc]
        assert not (tmp_path / "set").exists()
    prepare(good, tmp_path / "set", 1)
    assert contents(tmp_path / "set") == contents(prepare(good, tmp_path / "again", 1))


def ending() -> prepared.Images:
    os._exit(9)


def test_a_process_that_the_system_ends(tmp_path: Path) -> None:
    good = numbered()
    bad = replace(good, pieces=(*good.pieces[:5], Piece("train", "bad", ending), *good.pieces[6:]))
    message = message_of(lambda: prepare(bad, tmp_path / "set", 2))
    assert message.startswith("a process that read numbers was ended by the system") and "--workers 1" in message
    assert not (tmp_path / "set").exists()
    prepare(good, tmp_path / "set", 1)


SCRIPT = """
from dataclasses import replace
from nelbo.data import load, official
files = (official.File("cifar-10-binary.tar.gz"),)
known = replace(official.OFFICIAL["cifar10"], kits={"binary": files}, counts={}, cut={"validation": 5})
official.OFFICIAL["cifar10"] = known
print(len(load("cifar10").images["train"]))
"""


def test_a_script_without_a_guard_may_load_a_set_that_is_not_prepared(tmp_path: Path) -> None:
    cifar_folder(tmp_path / "files", "binary").rename(tmp_path / "cifar10")
    (tmp_path / "data" / "raw").mkdir(parents=True)
    (tmp_path / "cifar10").rename(tmp_path / "data" / "raw" / "cifar10")
    (tmp_path / "script.py").write_text(SCRIPT)
    found = subprocess.run(
        [sys.executable, tmp_path / "script.py"], env={**os.environ, "NELBO_DATA": str(tmp_path / "data")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (found.stdout, found.returncode) == ("35\n", 0), found.stderr


def test_another_source_does_not_go_on_from_old_pieces(tmp_path: Path) -> None:
    first = Plan("numbers", (Piece("train", "a", partial(numbers, 100, 150)),), 256, "numbers", origin={"bytes": 1})
    with pytest.raises(UserError):
        prepare(replace(first, counts={"train": 7}), tmp_path / "set", 1)
    second = replace(first, pieces=(Piece("train", "a", partial(numbers, 0, 50)),), origin={"bytes": 2})
    found = open_prepared(prepare(second, tmp_path / "set", 1))
    assert max(labels.max() for labels in found.labels.values()) == 49  # type: ignore[union-attr]


@pytest.mark.parametrize("most", [700, 12_000])  # of a piece's file, of a split's
def test_a_full_disk(tmp_path: Path, most: int) -> None:
    """Files may not grow beyond some bytes, which fails as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        message = message_of(lambda: prepare(numbered(), tmp_path / "set", 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert message.startswith(f"cannot write {tmp_path / 'set'}") and "what was complete before is kept" in message
    assert not (tmp_path / "set").exists()
    verify(prepare(numbered(), tmp_path / "set", 1))


def test_what_cannot_be_prepared(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").touch()
    assert message_of(lambda: prepare(numbered(), tmp_path / "set")) == (
        f"{tmp_path / 'set'} holds something else; a data set needs a new or empty folder"
    )
    wide = Piece("train", "wide", partial(zeros, (5, 1, 4, 5), "uint8"))
    floats = Piece("train", "floats", partial(zeros, (5, 1, 4, 4), "float32"))
    some = numbered().pieces
    assert message_of(lambda: prepare(numbered(pieces=(*some, wide)), tmp_path / "a", 1)) == (
        "all images of numbers must have one shape (C, H, W): from 0 has (1, 4, 4), wide (1, 4, 5)"
    )
    assert message_of(lambda: prepare(numbered(pieces=(floats,)), tmp_path / "b", 1)) == (
        "floats must hold images (N, C, H, W) of type uint8, got float32 (5, 1, 4, 4)"
    )
    assert message_of(lambda: prepare(numbered(levels=16), tmp_path / "c", 1)) == (
        "train images of numbers must lie below levels = 16, got 255"
    )
    assert message_of(lambda: prepare(numbered(2), tmp_path / "d", 1)) == (
        "numbers must hold more than 2 images to cut validation and test out of train, got 2"
    )
    locked = tmp_path / "e.part"
    locked.mkdir()
    with prepared.checkpoints.locked(locked, "preparing"):
        assert message_of(lambda: prepare(numbered(), tmp_path / "e", 1)).startswith("another process is preparing")


def zeros(shape: tuple[int, ...], dtype: str) -> prepared.Images:
    return np.zeros(shape, dtype), np.zeros(len(np.zeros(shape)), np.int64)


def test_prepared_folders_that_were_changed(tmp_path: Path) -> None:
    folder = prepare(numbered(), tmp_path / "set", 1)
    path, record = folder / "train.npy", json.loads((folder / "dataset.json").read_text())
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert message_of(lambda: load(str(folder))) == (
        f"{path} must have {len(content)} bytes, got {len(content) - 1}: cut short or changed; prepare it again"
    )
    path.write_bytes(content[:-1] + b"\7")
    assert load(str(folder)).name == "numbers"  # opening does not read the images
    assert message_of(lambda: verify(folder)) == f"{path} was changed since it was prepared (SHA-256); prepare it again"
    path.write_bytes(content)
    (folder / "dataset.json").write_text(json.dumps(record | {"version": "0" * 12}))
    assert message_of(lambda: verify(folder)).endswith(
        "version 000000000000 is not that of its images; prepare it again"
    )
    (folder / "dataset.json").write_text(json.dumps(record | {"format": 9}))
    assert message_of(lambda: load(str(folder))).endswith("has format 9; this version of nelbo reads format 1")
    (folder / "dataset.json").write_text(json.dumps(record | {"levels": "many"}))
    assert message_of(lambda: load(str(folder))).endswith("levels must be of type int, got 'many'; it was changed")


MEMORY = """
import sys; sys.path.insert(0, "tests")
import re, resource
from functools import partial
from pathlib import Path
from nelbo.data.prepared import Piece, Plan, open_prepared, prepare, verify
from test_prepared import zeros
held = 1024 * int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
resource.setrlimit(resource.RLIMIT_DATA, (held + 2**20 * int(sys.argv[2]),) * 2)
pieces = tuple(Piece("train", str(i), partial(zeros, (2000, 3, 32, 32), "uint8")) for i in range(60))
verify(prepare(Plan("zeros", pieces, 256, "zeros"), Path(sys.argv[1]), 1))
print(len(open_prepared(Path(sys.argv[1])).images["train"]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize(("limit", "enough"), [(120, True), (20, False)])
def test_memory_does_not_grow_with_the_set(tmp_path: Path, limit: int, enough: bool) -> None:
    """369 MB of images in pieces of 6 MB, of which zeros() makes copies, within 120 MB; mapped files do not count."""
    found = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "set"), str(limit)], capture_output=True, text=True,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert (found.stdout.strip() == "96000") == enough, found.stderr


def test_a_model_reads_mapped_images_without_a_word(tmp_path: Path) -> None:
    """torch warns of arrays that cannot be written, and here a warning is an error. The figures are those of a copy."""
    images = colours(30, 8)
    np.save(tmp_path / "a.npy", images)
    mapped = open_prepared(prepare(file_plan(tmp_path / "a.npy"), tmp_path / "set", 1)).images["test"]
    model = nelbo.build("vdm-digits", (3, 8, 8), 256)
    for measure in (partial(nelbo.likelihood.vlb, times_per_shift=2), partial(nelbo.likelihood.ode, least_steps=4)):
        assert measure(model, mapped[:2]).mean == measure(model, np.array(mapped[:2])).mean
    one, two = (nelbo.elbo(model, x).total.mean().item() for x in (mapped, np.array(mapped)))
    assert one == two


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_folder_of_images_prepared_and_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(colours(30, 8)):
        (folder / f"{i:03d}.png").write_bytes(png(image))
    found = open_prepared(prepare(file_plan(folder), tmp_path / "set", 1))
    direct = load(str(folder))
    assert found.version == direct.version and found.name == direct.name
    for split in direct.images:
        np.testing.assert_array_equal(found.images[split], direct.images[split])


def test_grey_images_have_one_channel_when_prepared_too(tmp_path: Path) -> None:
    folder = tmp_path / "grey"
    folder.mkdir()
    for i in range(20):
        Image.fromarray(RNG.integers(0, 256, (6, 6), np.uint8)).save(folder / f"{i:02d}.webp", lossless=True)
    found = open_prepared(prepare(file_plan(folder), tmp_path / "set", 1))
    assert found.shape == (1, 6, 6) and found.version == load(str(folder)).version


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_arrays_prepared_and_as_they_are(tmp_path: Path, suffix: str) -> None:
    images, path = colours(30, 4), tmp_path / f"a.{suffix}"
    if suffix == "npy":
        np.save(path, images)
    else:
        np.savez(path, images=images % 16, labels=np.arange(30) % 3, levels=16)
    found, direct = open_prepared(prepare(file_plan(path), tmp_path / "set", 1)), load(str(path))
    assert (found.version, found.levels, found.classes) == (direct.version, direct.levels, direct.classes)


def test_resize_and_crop(tmp_path: Path) -> None:
    blocks = RNG.integers(0, 256, (6, 8, 3), np.uint8)
    image = blocks.repeat(5, 0).repeat(5, 1)  # 30 x 40
    np.testing.assert_array_equal(Resize(6)(image, "it"), blocks[:, 1:7])  # the mean of each block
    np.testing.assert_array_equal(Resize(crop=20)(image, "it"), image[5:25, 10:30])
    np.testing.assert_array_equal(Resize(4, crop=20)(image, "it"), blocks[1:5, 2:6])
    assert message_of(lambda: Resize(crop=31)(image, "it")) == "--crop 31 needs images at least as large, it is 30x40"
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(12):
        Image.fromarray(image[: 30 - i % 2]).save(folder / f"{i:02d}.png")
    assert "all images must have one size" in message_of(lambda: prepare(file_plan(folder), tmp_path / "a", 1))
    found = open_prepared(prepare(file_plan(folder, Resize(6, filter="lanczos")), tmp_path / "b", 1))
    assert found.shape == (3, 6, 6)
    assert "the shorter side to 6 by pillow's lanczos, the middle" in found.description


# The hub -------------------------------------------------------------------------------------------------------------


def test_a_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder stands in for the hub: the library reads both the same way."""
    import datasets

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("NELBO_DATA", str(tmp_path / "data"))
    images = {"train": colours(20, 8), "validation": colours(6, 8), "test": colours(4, 8)}
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=3), "fine": datasets.Value("string")}
    )
    repository = tmp_path / "set"
    for split, pictures in images.items():
        rows = {
            "img": [{"bytes": png(image), "path": None} for image in pictures],
            "label": [-1 if split == "test" else i % 3 for i in range(len(pictures))],  # a competition's secret
            "fine": ["x"] * len(pictures),
        }
        (repository / "data").mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(repository / "data" / f"{split}-00000.parquet")
    source = f"hub:{repository}"
    found = load(source)
    rows = cut_rows(20, {"validation": 2})
    np.testing.assert_array_equal(found.images["train"], images["train"][rows["train"]])
    np.testing.assert_array_equal(found.images["test"], images["validation"])
    np.testing.assert_array_equal(found.labels["test"], np.arange(6) % 3)  # type: ignore[index]
    assert "test is its validation set" in found.description
    assert load(source).version == found.version
    assert "must have a split train" not in found.description
    missing = message_of(lambda: load(f"hub:{tmp_path / 'nothing'}"))
    assert missing.startswith(f"hub:{tmp_path / 'nothing'} cannot be had: ")
    assert "got no name" in message_of(lambda: load("hub:"))


# The loader ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 5, 1000, 65_537, 100_003])
def test_a_computed_order_is_a_permutation(count: int) -> None:
    orders = [shuffled(np.arange(count), count, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(count))
    if count > 5:
        assert all((a != b).mean() > 0.98 for a, b in ((orders[0], orders[1]), (orders[0], orders[2])))
        place = RNG.integers(0, count, 50)
        np.testing.assert_array_equal(shuffled(place, count, 0, 1), orders[1][place])


def test_a_computed_order_is_as_good_as_random() -> None:
    """Where the first ten places of 500 epochs of 65 537 images lie, in ten bins: chi^2 of 9 degrees, 99.9 %; and
    neighbours: how far apart, and how often they follow one another (Poisson of mean 1 in each epoch)."""
    count = 65_537
    for place in range(10):
        shown = np.array([shuffled(np.array([place]), count, 5, epoch)[0] for epoch in range(500)])
        counts = np.histogram(shown, 10, (0, count))[0]
        assert ((counts - 50) ** 2 / 50).sum() < 27.88 + 5  # the largest of ten
    order = shuffled(np.arange(count), count, 6).astype(float)
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 4 / np.sqrt(count)
    follow = [int((np.diff(shuffled(np.arange(count), count, 7, epoch)) == 1).sum()) for epoch in range(30)]
    assert 10 <= sum(follow) <= 55


@pytest.mark.parametrize("limit", [65_536, 10])
@pytest.mark.parametrize("augment", ["none", "vdm"])
def test_parts_of_a_batch_are_disjoint_and_make_the_whole(
    augment: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nelbo.data.loader.SORTED", limit)
    images, labels = colours(50, 4), np.arange(50)
    whole = [Batches(images, labels, 12, 3, augment).batch_at(step) for step in range(9)]
    for processes in (2, 3):
        size = 12 // processes
        parts = [Batches(images, labels, 12, 3, augment) for _ in range(processes)]
        for step, expected in enumerate(whole):
            got = [b.batch_at(step, slice(i * size, (i + 1) * size)) for i, b in enumerate(parts)]
            for name in ("images", "labels", "flag", "index"):
                np.testing.assert_array_equal(np.concatenate([getattr(g, name) for g in got]), getattr(expected, name))
    seen = np.concatenate([b.labels for b in whole])[:100]  # type: ignore[misc]
    assert (np.sort(seen.reshape(2, 50), 1) == labels).all()


def test_no_order_is_held_of_a_large_set() -> None:
    images = np.broadcast_to(np.zeros((1, 1, 1, 1), np.uint8), (1_281_149, 1, 1, 1))
    batches = Batches(images, None, 64, 0)
    batches.batch_at(5)
    assert batches.epochs == {}


# The verb ------------------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["data", *arguments])
    out, error = capsys.readouterr()
    return status, out, error


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NELBO_DATA", str(tmp_path / "data"))
    status, out, _ = run(capsys, "digits")
    assert status == 0 and out.splitlines()[1:] == ["version 1", "use: --data.source digits"]
    files = cifar_folder(tmp_path / "files", "binary")
    status, out, error = run(capsys, "cifar10", "--files", str(files), "--unofficial", "--workers", "1")
    folder = tmp_path / "data" / "cifar10-unofficial"
    assert status == 0 and "preparing cifar10 6/6" in error
    assert out.splitlines()[0] == (
        "cifar10-unofficial: CIFAR-10, 10 classes; test is the official one; 36 train, 4 validation, 8 test images of "
        "3x32x32, 256 levels"
    )
    assert out.splitlines()[-1] == f"use: --data.source {folder}"
    status, out, _ = run(capsys, str(folder), "--verify")
    assert status == 0 and "every file is as it was written (SHA-256)" in out
    np.save(tmp_path / "a.npy", colours(20, 4))
    status, out, _ = run(capsys, str(tmp_path / "a.npy"))
    assert status == 0 and f"nelbo data {tmp_path / 'a.npy'} --out FOLDER prepares it" in out
    status, out, _ = run(capsys, str(tmp_path / "a.npy"), "--out", str(tmp_path / "b"), "--workers", "1")
    assert status == 0 and out.splitlines()[-1] == f"use: --data.source {tmp_path / 'b'}"
    assert load(str(tmp_path / "b")).version == load(str(tmp_path / "a.npy")).version


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "or the path of a .npy or .npz file or of a folder of image files; 'nothing' is not there"),
        (("digits", "--files", "x"), "--files is for what is prepared from other files, and digits needs no preparing"),
        (
            ("cifar10", "--files", "/nowhere"),
            "--files must name the folder that holds the files of cifar10, and /now",
        ),
        (("cifar10", "--size", "0"), "--size must be at least 1, got 0"),
        (
            ("cifar10", "--size", "8"),
            "--size and --crop are for folders and sets of image files, and cifar10 has",
        ),
        (("cifar10", "--filter", "x"), "box"),
        (("nothing", "--out", "x"), "nothing is not there"),
    ],
)
def test_mistakes(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("NELBO_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    status, _, error = run(capsys, *arguments)
    assert status == 2 and message in error and error.count("\n") == 1
