"""Data: what is in the splits, what a batch holds, what a mistake says, and what the classical figures must be."""

import hashlib
import importlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nelbo.data import Batches, Dataset, baselines, load
from nelbo.data.dataset import SPLITS
from nelbo.data.loader import permutation
from nelbo.data.sources import photo_crops
from nelbo.errors import UserError

reference = importlib.import_module("nelbo.data.baselines")  # the package's own baselines is the function


def rows(images: np.ndarray) -> list[bytes]:
    return [image.tobytes() for image in images]


def noise(count: int, *shape: int, levels: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, levels, (count, *shape), dtype=np.uint8)


def dataset(train: np.ndarray, validation: np.ndarray, test: np.ndarray, levels: int) -> Dataset:
    return Dataset("made", "1", dict(zip(SPLITS, (train, validation, test), strict=True)), None, levels, "")


# Sources


def test_importing_is_cheap() -> None:
    code = "import sys, nelbo.data; print({'torch', 'sklearn', 'scipy', 'PIL', 'pandas'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_digits_are_all_there_with_their_labels() -> None:
    from sklearn.datasets import load_digits

    bunch, digits = load_digits(), load("digits")
    assert {split: len(digits.images[split]) for split in SPLITS} == {"train": 1297, "validation": 200, "test": 300}
    assert digits.labels is not None
    got = [pair for split in SPLITS for pair in zip(rows(digits.images[split]), digits.labels[split], strict=True)]
    expected = zip(rows(bunch.images.astype(np.uint8)), bunch.target, strict=True)
    assert sorted(got) == sorted(expected)
    assert len(set(got)) == len(got)  # no digit is in the set twice, so the splits share none
    assert (digits.shape, digits.levels, digits.classes) == ((1, 8, 8), 17, 10)
    assert max(digits.images[split].max() for split in SPLITS) == 16


@pytest.mark.parametrize(
    "name, checksums",
    [
        ("digits", ("bc8d2bcf83b0c179", "1f293784aa3508c0", "9fd93d26fb922bd8")),
        ("photos32", ("beb620e65ae75eaa", "08609cf4956fd0f3", "b12c454122c0e1e3")),
    ],
)
def test_built_in_sets_never_change(name: str, checksums: tuple[str, ...]) -> None:
    images = load(name).images
    assert tuple(hashlib.sha256(images[split].tobytes()).hexdigest()[:16] for split in SPLITS) == checksums
    assert all(images[split].dtype == np.uint8 for split in SPLITS)


def test_photo_crops_share_no_pixel_between_splits() -> None:
    """Photographs whose colours number their pixels show which pixels a crop holds."""
    number = np.arange(2 * 427 * 640).reshape(2, 427, 640)
    crops = photo_crops(list(np.stack([number >> 16, number >> 8 & 255, number & 255], -1).astype(np.uint8)))
    pixels = {}
    for split, images in crops.items():
        red, green, blue = images.astype(np.int64).transpose(1, 0, 2, 3)
        pixels[split] = red << 16 | green << 8 | blue
        assert (np.diff(pixels[split], axis=2) == 1).all()  # a crop is a square of neighbours
        assert (np.diff(pixels[split], axis=1) == 640).all()
    held = {split: set(values.flat) for split, values in pixels.items()}
    assert not held["train"] & held["test"]
    assert not held["train"] & held["validation"]
    assert not held["validation"] & held["test"]
    # JPEG coded these photographs in blocks of 8x8; none of them is in two splits either.
    blocks = {split: {(n // 640 // 427, n // 640 % 427 // 8, n % 640 // 8) for n in held[split]} for split in SPLITS}
    assert not blocks["train"] & blocks["test"] and not blocks["validation"] & blocks["test"]
    assert not blocks["train"] & blocks["validation"]
    assert {split: len(images) for split, images in crops.items()} == {"train": 3600, "validation": 104, "test": 104}
    assert len(held["test"]) == 104 * 32 * 32  # crops of test do not overlap
    assert len(held["validation"]) == 104 * 32 * 32
    assert len(held["train"]) == 2 * 4 * 96 * (392 + 32)


def test_photo_crops_show_the_photographs() -> None:
    from sklearn.datasets import load_sample_images

    china, flower = load_sample_images().images
    photos = load("photos32")
    np.testing.assert_array_equal(photos.images["test"][0], china[:32, 128:160].transpose(2, 0, 1))
    np.testing.assert_array_equal(photos.images["validation"][-1], flower[384:416, 576:608].transpose(2, 0, 1))
    np.testing.assert_array_equal(photos.images["train"][-1], flower[392:424, 544:576].transpose(2, 0, 1))
    assert (photos.shape, photos.levels, photos.classes, photos.labels) == ((3, 32, 32), 256, 0, None)


@pytest.mark.parametrize(
    "shape, axes",
    [
        ((30, 5, 6), None),
        ((30, 5, 6, 3), (0, 3, 1, 2)),
        ((30, 5, 6, 1), (0, 3, 1, 2)),
        ((30, 3, 5, 6), (0, 1, 2, 3)),
        ((30, 1, 5, 6), (0, 1, 2, 3)),
        ((30, 2, 5, 6), (0, 1, 2, 3)),
        ((30, 4, 5, 6), (0, 1, 2, 3)),
        ((30, 3, 5, 3), (0, 1, 2, 3)),  # both ends could be channels: the second axis has the first word
    ],
)
def test_layouts_of_arrays(tmp_path: Path, shape: tuple[int, ...], axes: tuple[int, ...] | None) -> None:
    values = noise(*shape)
    np.save(tmp_path / "a.npy", values)
    images = load(str(tmp_path / "a.npy")).images
    expected = values[:, None] if axes is None else values.transpose(axes)
    assert sorted(rows(np.concatenate(list(images.values())))) == sorted(rows(expected))
    assert {split: len(images[split]) for split in SPLITS} == {"train": 24, "validation": 3, "test": 3}


def test_splits_that_are_missing_are_cut_out_of_train(tmp_path: Path) -> None:
    images, labels = noise(57, 4, 4), np.arange(57)
    np.savez(tmp_path / "a.npz", images=images, labels=labels.astype(np.uint8))
    got = load(str(tmp_path / "a.npz"))
    assert got.labels is not None and got.classes == 57
    assert {split: len(got.images[split]) for split in SPLITS} == {"train": 47, "validation": 5, "test": 5}
    for split in SPLITS:
        np.testing.assert_array_equal(got.images[split][:, 0], images[got.labels[split]])
    assert sorted(np.concatenate(list(got.labels.values()))) == list(labels)
    # Test is brought along and stays as it is; only validation is cut.
    np.savez(tmp_path / "b.npz", train=images, test=images[:3], train_labels=labels, test_labels=labels[:3])
    got = load(str(tmp_path / "b.npz"))
    assert got.labels is not None
    assert {split: len(got.images[split]) for split in SPLITS} == {"train": 52, "validation": 5, "test": 3}
    np.testing.assert_array_equal(got.images["test"][:, 0], images[:3])
    assert sorted([*got.labels["train"], *got.labels["validation"]]) == list(labels)


def test_archives_of_three_splits_stay_as_they_are(tmp_path: Path) -> None:
    parts = {split: noise(n, 1, 2, 2, levels=5, seed=n) for split, n in zip(SPLITS, (4, 2, 1), strict=True)}
    np.savez_compressed(tmp_path / "a.npz", levels=5, **parts)
    got = load(str(tmp_path / "a.npz"))
    for split in SPLITS:
        np.testing.assert_array_equal(got.images[split], parts[split])
    assert (got.levels, got.labels, got.name) == (5, None, "a.npz")
    assert got.description == "a.npz: 4 train, 2 validation, 1 test images of 1x2x2, 5 levels"


def test_the_version_is_that_of_the_content(tmp_path: Path) -> None:
    images = noise(20, 4, 4, levels=200)
    changed = images.copy()
    changed[7, 1, 2] ^= 1
    np.save(tmp_path / "a.npy", images)
    np.savez(tmp_path / "b.npz", images=images)
    np.savez(tmp_path / "c.npz", images=changed)
    np.savez(tmp_path / "d.npz", images=images, levels=200)
    np.savez(tmp_path / "e.npz", images=images.reshape(20, 2, 8))
    a, b, c, d, e = (load(str(tmp_path / name)).version for name in ("a.npy", "b.npz", "c.npz", "d.npz", "e.npz"))
    assert a == b
    assert len({a, c, d, e}) == 4
    assert (load("digits").version, load("photos32").version) == ("1", "1")


def save(values: np.ndarray, path: Path, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)  # type: ignore[arg-type]


def test_folders_of_images(tmp_path: Path) -> None:
    grey = noise(20, 4, 5)
    for i, values in enumerate(grey):
        save(values, tmp_path / "grey" / f"{i:02}.{'png' if i % 2 else 'bmp'}")
    (tmp_path / "grey" / "notes.txt").write_text("no image")
    (tmp_path / "grey" / ".hidden.png").write_text("no image")
    got = load(str(tmp_path / "grey"))
    assert (got.name, got.levels, got.shape, got.labels) == ("grey", 256, (1, 4, 5), None)
    assert {split: len(got.images[split]) for split in SPLITS} == {"train": 16, "validation": 2, "test": 2}
    assert sorted(rows(np.concatenate(list(got.images.values())))) == sorted(rows(grey))
    np.save(tmp_path / "grey.npy", grey)  # the order of the names, hence the same split
    assert load(str(tmp_path / "grey.npy")).version == got.version
    # Three grey images in RGB files are still grey; one coloured pixel anywhere makes all RGB.
    for i in range(3):
        save(np.repeat(grey[i][..., None], 3, -1), tmp_path / "rgb" / f"{i}.png")
    assert load(str(tmp_path / "rgb")).shape == (1, 4, 5)
    colour = np.repeat(grey[3][..., None], 3, -1)
    colour[1, 2] = 1, 2, 3
    save(colour, tmp_path / "rgb" / "3.png")
    got = load(str(tmp_path / "rgb"))
    expected = [*(np.repeat(values[None], 3, 0) for values in grey[:3]), colour.transpose(2, 0, 1)]
    assert sorted(rows(np.concatenate(list(got.images.values())))) == sorted(rows(np.stack(expected)))


def test_folders_of_splits_and_other_modes(tmp_path: Path) -> None:
    values = noise(6, 4, 4, 3)
    for i, split in enumerate(("train", "train", "validation", "test")):
        suffix = "png" if i else "webp"
        save(values[i], tmp_path / "a" / split / f"{9 - i}.{suffix}", **({} if i else {"lossless": True}))
    got = load(str(tmp_path / "a")).images
    np.testing.assert_array_equal(got["train"], values[[1, 0]].transpose(0, 3, 1, 2))  # 8.png, then 9.webp
    np.testing.assert_array_equal(got["validation"], values[[2]].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(got["test"], values[[3]].transpose(0, 3, 1, 2))
    opaque = np.dstack([values[0], np.full((4, 4), 255, np.uint8)])
    bits = values[2][..., 0] > 100
    (tmp_path / "b").mkdir()
    Image.fromarray(opaque).save(tmp_path / "b" / "0.png")
    Image.fromarray(values[1]).quantize(16).save(tmp_path / "b" / "1.png")  # 16 pixels, so that a palette holds them
    Image.fromarray(bits).save(tmp_path / "b" / "2.png")
    got = load(str(tmp_path / "b")).images
    assert sorted(rows(np.concatenate(list(got.values())))) == sorted(
        rows(np.stack([values[0], values[1], np.dstack([bits] * 3) * np.uint8(255)]).transpose(0, 3, 1, 2))
    )


def message_of(source: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        load(str(source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


FEW = noise(10, 4, 4, levels=200)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"images": FEW.astype(np.float32)}, "images of {} must be of type uint8, got float32"),
        (
            {"images": FEW.reshape(10, 16)},
            "images of {} must be (N, H, W), (N, H, W, C) or (N, C, H, W), got shape (10, 16)",
        ),
        (
            {"images": noise(10, 8, 8, 4)},
            "images of {} must be (N, H, W, C) with C = 1 or 3, or (N, C, H, W) with C = 1, 3 or below H and W; "
            "got shape (10, 8, 8, 4)",
        ),
        ({"images": FEW[:0]}, "images of {} must hold at least 1 image of at least 1 pixel, got shape (0, 4, 4)"),
        ({"images": FEW, "levels": 17}, "images of {} must lie below levels = 17, got 194"),
        ({"train": FEW // 20, "test": FEW, "levels": 17}, "test of {} must lie below levels = 17, got 194"),
        ({"images": FEW, "levels": 257}, "levels of {} must lie from 2 to 256, got 257"),
        ({"images": FEW, "levels": 1}, "levels of {} must lie from 2 to 256, got 1"),
        ({"images": FEW, "levels": 17.0}, "levels of {} must be one whole number, got float64 of shape ()"),
        (
            {"train": FEW, "val": FEW},
            "unknown array val in {}; the choices are train, validation, test, train_labels, validation_labels, "
            "test_labels, levels",
        ),
        ({"images": FEW, "test": FEW}, "unknown array test in {}; the choices are images, labels, levels"),
        ({"test": FEW}, "{} must hold images, or train and perhaps validation and test; got test"),
        ({"levels": 17}, "{} must hold images, or train and perhaps validation and test; got none"),
        (
            {"train": FEW, "test": FEW[:, :3]},
            "all splits of {} must have images of one shape (C, H, W), got train (1, 4, 4) and test (1, 3, 4)",
        ),
        (
            {"images": FEW, "labels": np.arange(9)},
            "labels of {} must be as many as the images, got 9 labels for 10 images",
        ),
        (
            {"train": FEW, "test": FEW, "train_labels": np.arange(10)},
            "labels of {} must be as many as the images, got 0 test_labels for 10 test",
        ),
        (
            {"images": FEW, "labels": np.arange(10.0)},
            "labels of {} must be whole numbers (N,), got float64 of shape (10,)",
        ),
        ({"images": FEW, "labels": np.arange(10) - 1}, "labels of {} must be 0 or more, got -1"),
        ({"images": FEW[:2]}, "{} must hold at least 3 images to cut validation and test out of train, got 2"),
        (
            {"train": FEW[:1], "test": FEW},
            "{} must hold at least 2 images to cut validation out of train, got 1",
        ),
    ],
)
def test_mistakes_in_archives(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    assert message_of(tmp_path / "a.npz") == message.format(tmp_path / "a.npz")


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.mat").touch()
    for source, problem in (
        ("digit", "is not there"),
        (tmp_path / "b.npz", "is not there"),
        (tmp_path / "a.mat", "is neither a .npy nor a .npz file"),
    ):
        assert message_of(source) == (
            "a data source must be one of digits, photos32, cifar10, fashion-mnist, imagenet32-old, imagenet32-new, "
            f"imagenet64, or the path of a .npy or .npz file or of a folder of image files; '{source}' {problem}"
        )


@pytest.mark.parametrize("kind", ["pickled", "empty", "cut", "cut npy", "damaged"])
def test_damaged_and_pickled_arrays(tmp_path: Path, kind: str) -> None:
    file = tmp_path / ("a.npy" if kind in ("pickled", "cut npy") else "a.npz")
    if kind == "pickled":
        np.save(file, np.array([FEW, None], dtype=object), allow_pickle=True)
    elif file.suffix == ".npy":
        np.save(file, FEW)
    else:
        np.savez(file, images=FEW)
    content = bytearray(file.read_bytes())
    content[250] ^= 255 if kind == "damaged" else 0  # one pixel
    file.write_bytes(content[: {"empty": 0, "cut": -30, "cut npy": -1}.get(kind)])
    assert message_of(file).startswith(
        f"cannot read {file}: it must hold plain arrays as numpy.save or numpy.savez writes them, not cut short and "
        "without pickled objects ("
    )


def empty(path: Path) -> None:
    (path / "notes.txt").touch()


def empty_split(path: Path) -> None:
    save(FEW[0], path / "train" / "0.png")
    (path / "validation").mkdir()


def split_beside_images(path: Path) -> None:
    save(FEW[0], path / "0.png")
    save(FEW[0], path / "test" / "0.png")


def unknown_split(path: Path) -> None:
    save(FEW[0], path / "train" / "0.png")
    save(FEW[0], path / "val" / "0.png")


def no_train(path: Path) -> None:
    save(FEW[0], path / "test" / "0.png")


def sizes(path: Path) -> None:
    save(FEW[0], path / "0.png")
    save(FEW[0][:3], path / "1.png")


def few(path: Path) -> None:
    save(FEW[0], path / "0.png")
    save(FEW[1], path / "1.png")


def no_image(path: Path) -> None:
    save(FEW[0], path / "0.png")
    (path / "1.png").write_text("no image")


def truncated(path: Path) -> None:
    save(noise(1, 64, 64)[0], path / "1.png")
    (path / "1.png").write_bytes((path / "1.png").read_bytes()[:-1000])


def deep(path: Path) -> None:
    save(FEW[0].astype(np.uint16) * 256, path / "1.png")


def transparent(path: Path) -> None:
    save(noise(1, 4, 5, 4)[0], path / "1.png")


NONE = "a folder must hold image files, or sub-folders train, validation, test of them, got none in {}"
EITHER = "{} must hold either image files or the sub-folders train, validation, test, got "


@pytest.mark.parametrize(
    "make, message",
    [
        (empty, NONE),
        (empty_split, NONE + "/validation"),
        (split_beside_images, EITHER + "0.png beside test"),
        (unknown_split, EITHER + "val beside train"),
        (no_train, "{} must hold images, or train and perhaps validation and test; got test"),
        (sizes, "all images must have one size: {}/0.png has 4x4 (HxW), {}/1.png 3x4"),
        (few, "{} must hold at least 3 images to cut validation and test out of train, got 2"),
        (no_image, "cannot take the image {}/1.png: cannot identify image file '{}/1.png'"),
        (truncated, "cannot take the image {}/1.png: image file is truncated"),
        (deep, "cannot take the image {}/1.png: it must have 8 bits a channel, got pillow's mode I;16"),
        (transparent, "cannot take the image {}/1.png: it must be opaque, got transparent pixels"),
    ],
)
def test_mistakes_in_folders(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path)
    assert message_of(tmp_path).startswith(message.replace("{}", str(tmp_path)))


# Batches

IMAGES = noise(10, 3, 4, 4, seed=1)


def numbered(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images whose pixels, and labels that, are their number."""
    labels = np.arange(count)
    return np.tile(labels[:, None, None, None].astype(np.uint8), (1, 1, 2, 2)), labels


@pytest.mark.parametrize("batch", [1, 3, 5, 7, 10, 24])
def test_every_epoch_sees_every_image_once(batch: int) -> None:
    images, labels = numbered(10)
    batches = Batches(images, labels, batch, seed=3)
    got = [batches.batch_at(step) for step in range(-(-50 // batch))]
    shown = np.concatenate([b.images[:, 0, 0, 0] for b in got])[:50].reshape(5, 10)
    assert (np.sort(shown, 1) == labels).all()
    assert len({tuple(epoch) for epoch in shown}) == 5
    for epoch, order in enumerate(shown):
        np.testing.assert_array_equal(order, permutation(10, 3, epoch))
    np.testing.assert_array_equal(np.concatenate([b.index for b in got]), np.arange(batch * len(got)))
    for b in got:
        assert b.labels is not None
        np.testing.assert_array_equal(b.labels, b.images[:, 0, 0, 0])
        np.testing.assert_array_equal(b.flag, np.zeros(batch, np.float32))
    assert set(batches.epochs) == set(got[-1].index // 10)  # no more permutations are kept than are in use


@pytest.mark.parametrize("augment", ["none", "flip", "turn", "vdm"])
def test_resuming_continues_the_stream(augment: str) -> None:
    labels = np.arange(10)
    through = Batches(IMAGES, labels, 4, 7, augment)
    expected = [through.batch_at(step) for step in range(9)]
    for step in (8, 3, 4, 0):  # fresh and in any order
        got = Batches(IMAGES, labels, 4, 7, augment).batch_at(step)
        for name in ("images", "labels", "flag", "index"):
            np.testing.assert_array_equal(getattr(got, name), getattr(expected[step], name))
    other = [Batches(IMAGES, labels, 4, 8, augment).batch_at(step) for step in range(9)]
    assert any((b.labels != e.labels).any() for b, e in zip(other, expected, strict=True))
    assert augment == "none" or any((b.flag != e.flag).any() for b, e in zip(other, expected, strict=True))
    np.testing.assert_array_equal(IMAGES, noise(10, 3, 4, 4, seed=1))  # augmenting leaves the images alone


@pytest.mark.parametrize("augment", ["flip", "turn", "vdm"])
def test_an_example_does_not_depend_on_its_batch(augment: str) -> None:
    whole = Batches(IMAGES, None, 36, 7, augment).batch_at(0)
    small = [Batches(IMAGES, None, 4, 7, augment).batch_at(step) for step in range(9)]
    np.testing.assert_array_equal(whole.images, np.concatenate([b.images for b in small]))
    np.testing.assert_array_equal(whole.flag, np.concatenate([b.flag for b in small]))
    assert whole.labels is None
    assert 0 < whole.flag.mean() < 1


def test_the_stream_never_changes() -> None:
    """These numbers are a promise to unfinished runs, whatever numpy they resume with."""
    assert permutation(10, 0).tolist() == [1, 0, 4, 3, 2, 5, 8, 6, 9, 7]
    assert permutation(10, 5, 3).tolist() == [1, 8, 2, 9, 3, 7, 0, 5, 4, 6]
    images = (np.arange(480) % 251).astype(np.uint8).reshape(10, 3, 4, 4)
    got = Batches(images, None, 1000, 11, "vdm").batch_at(2)
    assert hashlib.sha256(got.images.tobytes() + got.flag.tobytes()).hexdigest()[:16] == "58a8b001821a9b26"


def test_large_seeds_are_seeds() -> None:
    orders = {tuple(permutation(20, seed, epoch)) for seed in (2**63, 2**63 + 1, 2**64 - 1) for epoch in (0, 5)}
    assert len(orders) == 6
    flags = {tuple(Batches(IMAGES, None, 40, seed, "flip").batch_at(1).flag) for seed in (2**63, 2**63 + 1, 2**64 - 1)}
    assert len(flags) == 3


def test_flips() -> None:
    got = Batches(IMAGES, None, 4000, 2, "flip").batch_at(0)
    sources = IMAGES[np.concatenate([permutation(10, 2, e) for e in range(400)])]
    flipped = got.flag == 1
    np.testing.assert_array_equal(got.images[flipped], sources[flipped][..., ::-1])
    np.testing.assert_array_equal(got.images[~flipped], sources[~flipped])
    assert abs(flipped.mean() - 0.5) < 4 * 0.5 / math.sqrt(4000)
    # Neighbours in the stream are flipped independently.
    assert abs((flipped[1:] == flipped[:-1]).mean() - 0.5) < 4 * 0.5 / math.sqrt(4000)


@pytest.mark.parametrize(("augment", "channels"), [("vdm", 3), ("vdm", 1), ("turn", 3)])
def test_turns_and_channels(augment: str, channels: int) -> None:
    """Every example is its image flipped, turned and, by VDM, recoloured in one way, with the frequencies of VDM's and
    i-DODE's code."""
    count = 12000
    images = IMAGES[:, :channels]
    got = Batches(images, None, count, 2, augment).batch_at(0)
    sources = images[np.concatenate([permutation(10, 2, e) for e in range(count // 10)])]
    orders = list(permutations(range(channels)))
    found = np.zeros((2, 4, len(orders)))
    matches = np.zeros(count, int)
    for flip in range(2):
        flipped = sources[..., ::-1] if flip else sources
        for turns in range(4):
            turned = np.rot90(flipped, turns, (2, 3))
            for number, order in enumerate(orders):
                match = (got.images == turned[:, list(order)]).all((1, 2, 3))
                matches += match
                found[flip, turns, number] = match.sum()
                np.testing.assert_array_equal(got.flag[match], float((flip, turns, number) != (0, 0, 0)))
    assert (matches == 1).all()
    recoloured = np.eye(len(orders))[0]
    if augment == "vdm" and channels == 3:
        recoloured = np.array([7 / 12] + [1 / 12] * 5)
    expected = np.multiply.outer(np.multiply.outer([1 / 2, 1 / 2], [1 / 2] + [1 / 6] * 3), recoloured)
    assert (abs(found / count - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / count)).all()


@pytest.mark.parametrize(
    "images, batch, augment, message",
    [
        (IMAGES, 4, "rotate", "data.augment must be one of none, flip, turn, vdm, got 'rotate'"),
        (
            IMAGES[..., :3],
            4,
            "turn",
            "data.augment = turn turns images and needs square ones, got 4x3; the choices are none and flip",
        ),
        (IMAGES, 0, "none", "a batch must hold at least 1 image, got 0"),
        (IMAGES[:0], 4, "none", "batches need at least 1 image, got 0"),
    ],
)
def test_mistakes_with_batches(images: np.ndarray, batch: int, augment: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Batches(images, None, batch, 0, augment)
    assert str(caught.value) == message


# Baselines


def test_histogram_by_hand() -> None:
    train = np.array([[0, 2], [0, 2], [0, 1], [1, 2]], np.uint8).reshape(4, 1, 1, 2)
    validation = np.array([[0, 2], [1, 2]], np.uint8).reshape(2, 1, 1, 2)
    test = np.array([[0, 2], [2, 0]], np.uint8).reshape(2, 1, 1, 2)
    got = reference.histogram(dataset(train, validation, test, 3))

    def p(count: int, alpha: float) -> float:
        return (count + alpha) / (4 + 3 * alpha)

    # Validation has counts 3, 3 and 1, 3 of 4.
    alpha = max(reference.ALPHAS, key=lambda a: p(3, a) ** 3 * p(1, a))
    assert alpha == 0.01
    first, second = -math.log2(p(3, alpha)), -math.log2(p(0, alpha))
    assert got.bits_per_dim == pytest.approx((first + second) / 2, rel=1e-12)
    assert got.standard_error == pytest.approx(abs(first - second) / 2, rel=1e-12)
    assert got.note == "independent pixels, 0.01 added to every count (chosen on validation): exact"
    # A validation set of unseen values wants the flattest histogram, in which everything costs about log2 L.
    unseen = np.array([[2, 0]], np.uint8).reshape(1, 1, 1, 2)
    got = reference.histogram(dataset(train, unseen, test, 3))
    assert "10.0 added" in got.note
    assert got.bits_per_dim == pytest.approx(-(math.log2(p(3, 10)) + math.log2(p(0, 10))) / 2, rel=1e-12)


def test_histogram_finds_the_entropy() -> None:
    rng = np.random.default_rng(0)
    probabilities = np.array([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0]])
    values = np.stack([rng.choice(4, 30000, p=row) for row in probabilities], 1).astype(np.uint8).reshape(-1, 3, 1, 1)
    got = reference.histogram(dataset(values[:10000], values[10000:20000], values[20000:], 4))
    assert got.standard_error is not None
    assert abs(got.bits_per_dim - (1.75 + 2 + 0) / 3) < 4 * got.standard_error
    # Only the first pixel's cost varies: 1, 2 or 3 bits with variance 0.6875.
    assert got.standard_error == pytest.approx(math.sqrt(0.6875) / 3 / 100, rel=0.03)


def test_mixture_finds_the_entropy_of_a_gaussian() -> None:
    """A Gaussian rounded to whole levels has very nearly the entropy h = 1/2 log2 det(2 pi e S) bits."""
    rng = np.random.default_rng(0)
    covariance = np.array([[400.0, 300.0], [300.0, 400.0]])
    values = np.floor(rng.multivariate_normal([128, 128], covariance, 14000)).clip(0, 255)
    images = values.astype(np.uint8).reshape(-1, 1, 1, 2)
    got = reference.gaussian_mixture(dataset(images[:8000], images[8000:9000], images[9000:], 256))
    entropy = math.log2((2 * math.pi * math.e) ** 2 * np.linalg.det(covariance)) / 2 / 2  # bits/dim
    assert got.standard_error is not None
    assert got.standard_error == pytest.approx(1 / (2 * math.log(2) * math.sqrt(5000)), rel=0.1)  # Var[-ln p] = 1
    assert abs(got.bits_per_dim - entropy) < 0.01 + 3 * got.standard_error
    assert "full covariance" in got.note and "an upper bound" in got.note


def test_mixture_of_uniform_levels_costs_log2_of_their_number() -> None:
    """Exactly log2 L is the least; eight Gaussians come close in one dimension."""
    values = noise(9000, 1, 1, 1, levels=16)
    got = reference.gaussian_mixture(dataset(values[:6000], values[6000:7000], values[7000:], 16))
    assert 4 <= got.bits_per_dim < 4.06


def test_mixture_is_diagonal_in_many_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Independent Gaussian pixels, more than a full covariance would be given."""
    values = np.floor(np.random.default_rng(0).normal(128, 20, (1600, 1, 1, 257))).clip(0, 255).astype(np.uint8)
    got = reference.gaussian_mixture(dataset(values[:1000], values[1000:1200], values[1200:], 256))
    entropy = math.log2(2 * math.pi * math.e * 400) / 2
    assert "diagonal covariance" in got.note
    assert entropy - 0.02 < got.bits_per_dim < entropy + 0.1
    monkeypatch.setattr(reference, "TRAIN_LIMIT", 40)
    few = reference.gaussian_mixture(dataset(values[:1000], values[1000:1200], values[1200:], 256))
    assert "40 training images" in few.note
    assert few.bits_per_dim > got.bits_per_dim


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("kind", ["PNG", "WebP"])
def test_files_are_real_and_counted_in_full(tmp_path: Path, kind: str, channels: int) -> None:
    images = noise(5, channels, 6, 7, levels=40)
    made = dataset(images, images, images, 40)
    pictures = [image.transpose(1, 2, 0) if channels == 3 else image.reshape(-1, 7) for image in images]
    sizes = []
    for picture in pictures:
        file = tmp_path / f"a.{kind.lower()}"
        file.write_bytes(reference.image_file(picture, kind))
        sizes.append(file.stat().st_size)
        with Image.open(file) as image:
            assert (image.format or "").lower() == kind.lower()
            assert image.mode in ("L", "RGB")
            np.testing.assert_array_equal(np.asarray(image.convert("RGB" if channels == 3 else "L")), picture)
    alone, together = reference.image_files(made, "test", kind)
    bits = 8 * np.array(sizes) / (channels * 6 * 7)
    assert alone.bits_per_dim == pytest.approx(bits.mean(), rel=1e-12)
    assert alone.standard_error == pytest.approx(bits.std(ddof=1) / math.sqrt(5), rel=1e-12)
    sheet = reference._sheet(images)
    height = pictures[0].shape[0]
    columns = sheet.shape[1] // 7
    for i, picture in enumerate(pictures):
        top, left = i // columns * height, i % columns * 7
        np.testing.assert_array_equal(sheet[top : top + height, left : left + 7], picture)
    assert together.bits_per_dim == 8 * len(reference.image_file(sheet, kind)) / images.size
    assert together.standard_error is None
    assert "tiled in one file" in together.note


def test_large_sets_take_several_sheets(monkeypatch: pytest.MonkeyPatch) -> None:
    images = noise(9, 1, 8, 8)
    made = dataset(images, images, images, 256)
    monkeypatch.setattr(reference, "SHEET", 16)  # four images a sheet
    together = reference.image_files(made, "test", "PNG")[1]
    sheets = [reference._sheet(images[i : i + 4]) for i in (0, 4, 8)]
    assert [sheet.shape for sheet in sheets] == [(16, 16), (16, 16), (8, 8)]
    assert together.bits_per_dim == sum(8 * len(reference.image_file(sheet, "PNG")) for sheet in sheets) / images.size
    assert "9 images tiled in 3 files" in together.note


def test_file_settings_are_strong() -> None:
    """A picture's file is no longer than those of other settings: near the least effort, and the most of one kind."""
    for picture in (load("photos32").images["test"][60].transpose(1, 2, 0), load("digits").images["test"][0, 0]):
        for kind, options in (
            ("PNG", {"compress_level": 1}),
            ("PNG", {"optimize": True}),
            ("WebP", {"lossless": True, "quality": 50, "method": 1}),
            ("WebP", {"lossless": True, "quality": 100, "method": 3, "exact": True}),
            ("WebP", {"lossless": True, "quality": 100, "method": 6, "exact": True}),
        ):
            file = BytesIO()
            Image.fromarray(np.ascontiguousarray(picture)).save(file, kind, **options)  # type: ignore[arg-type]
            assert len(reference.image_file(np.ascontiguousarray(picture), kind)) <= len(file.getvalue())


def test_figures_of_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits, cache = load("digits"), tmp_path / "baselines.json"
    found = baselines(digits, cache=cache)
    figures = {baseline.name: baseline.bits_per_dim for baseline in found}
    assert figures["pixel histogram"] == pytest.approx(2.438504, abs=1e-6)
    assert figures["Gaussian mixture"] == pytest.approx(2.66, abs=0.03)
    assert list(figures) == [
        "pixel histogram",
        "Gaussian mixture",
        "PNG per image",
        "PNG sheet",
        "WebP per image",
        "WebP sheet",
    ]
    assert all(math.isfinite(value) and value > 0 for value in figures.values())

    def again(*_: object) -> None:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        for name in ("histogram", "gaussian_mixture", "image_files"):
            patch.setattr(reference, name, again)
        assert baselines(digits, cache=str(cache)) == found
        for split, version in (("validation", "1"), ("test", "2")):
            other = Dataset("digits", version, digits.images, None, 17, "")
            with pytest.raises(AssertionError, match="measured again"):
                baselines(other, split, cache)
    baselines(digits, "validation", cache)
    assert len(json.loads(cache.read_text())) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["baselines.json"]


@pytest.mark.parametrize("content", ["{", "[1]", '{"name": "run"}', '{"digits 1 test 1": [{"name": 3}]}'])
def test_a_file_that_is_no_cache_is_left_alone(tmp_path: Path, content: str) -> None:
    cache = tmp_path / "meta.json"
    cache.write_text(content)
    with pytest.raises(UserError) as caught:
        baselines(load("digits"), cache=cache)
    assert str(caught.value) == f"{cache} must be a cache of baselines or not be there; delete it or name another"
    assert cache.read_text() == content


def test_mistakes_with_baselines() -> None:
    images = noise(3, 1, 2, 2)
    with pytest.raises(UserError, match=r"^the split must be one of train, validation, test, got 'eval'$"):
        baselines(dataset(images, images, images, 256), "eval")
    with pytest.raises(UserError, match=r"^baselines need at least 2 training images, got 1$"):
        baselines(dataset(images[:1], images, images, 256))
