"""Batches whose order and augmentation are functions of (seed, step): nothing to save, and resuming is exact.

The training examples are an endless stream. Epoch e is a permutation of the N images drawn from (seed, e), and the
stream is one epoch after another, so a batch may straddle epochs:

    (1)  batch number ``step`` holds the positions  i = step * batch + (0 .. batch - 1)
    (2)  position i shows the image  permutation_e[i mod N],  e = floor(i / N)
    (3)  the augmentation of position i is drawn from (seed, i)

Up to 65 536 images an epoch's permutation is sorted words. Beyond that it is computed place by place, so that no
process holds the order of an epoch: a Feistel network of six rounds on the 2 h >= log2 N bits of a place, (L, R) its
halves,

    (4)  (L, R) -> (R, L xor f_r(R)),   f_r(R) = the top h bits of mix(R + k_r),   again until the result is below N

which is one-to-one whatever f is. mix is the finaliser of splitmix64, the keys k_r are words of (seed, e). The random
words are Philox's own, used as they are: numpy promises that these do not change between its versions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from nelbo.errors import UserError

__all__ = ["AUGMENTATIONS", "Batch", "Batches", "permutation", "shuffled"]

# The last word of the counter says what the numbers are for; nelbo.draws counts its streams from 0.
ORDER, AUGMENT = 1000, 1001
SORTED = 65_536  # images up to which a permutation is sorted words
ROUNDS = 6  # of equation (4)


@dataclass(frozen=True, eq=False)
class Batch:
    """Some examples of the stream."""

    images: np.ndarray  # (B, C, H, W) uint8
    labels: np.ndarray | None  # (B,) int64
    flag: np.ndarray  # (B,) float32: 1 where the image was augmented
    index: np.ndarray  # (B,) int64: position in the stream


class Batches:
    """Equations (1) to (3) over images (N, C, H, W) uint8 and labels (N,) int64 or None."""

    def __init__(
        self, images: np.ndarray, labels: np.ndarray | None, batch: int, seed: int, augment: str = "none"
    ) -> None:
        if augment not in AUGMENTATIONS:
            raise UserError(f"data.augment must be one of {', '.join(AUGMENTATIONS)}, got {augment!r}")
        if augment in ("turn", "vdm") and images.shape[2] != images.shape[3]:
            raise UserError(
                f"data.augment = {augment} turns images and needs square ones, "
                f"got {images.shape[2]}x{images.shape[3]}; the choices are none and flip"
            )
        if batch < 1:
            raise UserError(f"a batch must hold at least 1 image, got {batch}")
        if not len(images):
            raise UserError("batches need at least 1 image, got 0")
        self.images, self.labels, self.batch, self.seed = images, labels, batch, seed
        self.augment = AUGMENTATIONS[augment]
        self.epochs: dict[int, np.ndarray] = {}  # the permutations that the last batch used

    def index_at(self, step: int, part: slice = slice(None)) -> np.ndarray:
        """The numbers of that batch's examples, or a part of them: how many there were before, int64."""
        return step * self.batch + np.arange(self.batch, dtype=np.int64)[part]

    def batch_at(self, step: int, part: slice = slice(None)) -> Batch:
        """Batch number ``step``, counted from 0, or a part of it: the same call always returns the same images."""
        index = self.index_at(step, part)
        count = len(self.images)
        epoch, place = np.divmod(index, count)
        epochs = range(int(epoch[0]), int(epoch[-1]) + 1)
        if count <= SORTED:
            known = self.epochs
            self.epochs = {e: known[e] if e in known else permutation(count, self.seed, e) for e in epochs}
        chosen = np.empty_like(place)
        for e in epochs:
            here = epoch == e
            places = place[here]
            chosen[here] = self.epochs[e][places] if count <= SORTED else shuffled(places, count, self.seed, e)
        # One turn of the counter is four words, so position i owns the words of turn i whatever the batch.
        words = _words(self.seed, 0, int(index[0]), AUGMENT, 4 * len(index)).reshape(-1, 4)
        images, changed = self.augment(np.ascontiguousarray(self.images[chosen]), words)
        labels = None if self.labels is None else self.labels[chosen]
        return Batch(images, labels, changed.astype(np.float32), index)


def permutation(count: int, seed: int, epoch: int = 0) -> np.ndarray:
    """A permutation of 0 .. count - 1, (count,) int64, drawn from (seed, epoch)."""
    return np.argsort(_words(seed, epoch, 0, ORDER, count), kind="stable")


def shuffled(place: np.ndarray, count: int, seed: int, epoch: int = 0) -> np.ndarray:
    """Equation (4): what a permutation of 0 .. count - 1 drawn from (seed, epoch) has in those places, int64."""
    half = (max(count - 1, 1).bit_length() + 1) // 2
    keys, mask, shift = _words(seed, epoch, 0, ORDER, ROUNDS), np.uint64(2**half - 1), np.uint64(64 - half)
    found = place.astype(np.uint64)
    walking = np.arange(len(found))
    while len(walking):
        values = found[walking]
        left, right = values >> np.uint64(half), values & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) >> shift)
        values = (left << np.uint64(half)) | right
        found[walking] = values
        walking = walking[values >= count]
    return found.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser of uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _words(seed: int, index: int, start: int, stream: int, count: int) -> np.ndarray:
    """Random words, (count,) uint64; ``start`` is the turn of the counter at which they begin."""
    # As arrays: lists of numbers above and below 2^63 would turn into floats.
    state = np.array([seed, index, start, 0, 0, stream], dtype=np.uint64)
    return np.random.Philox(key=state[:2], counter=state[2:]).random_raw(count)


def none(images: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The images as they are."""
    return images, np.zeros(len(images), dtype=bool)


def flip(images: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left and right exchanged with probability 1/2."""
    flipped = words[:, 0] % 2 == 1
    images[flipped] = images[flipped, :, :, ::-1]
    return images, flipped


def turn(images: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """i-DODE's augmentation of CIFAR-10, as in its public code: flip, then with probability 1/2 a turn by 1, 2 or 3
    quarters, equally likely."""
    images, changed = flip(images, words)
    turns = np.where(words[:, 1] % 2 == 1, 1 + words[:, 1] // 2 % 3, 0)
    for k in (1, 2, 3):
        images[turns == k] = np.rot90(images[turns == k], k, axes=(2, 3))
    return images, changed | (turns > 0)


def vdm(images: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """VDM's augmentation of CIFAR-10, as in its public code: flips and turns, then with probability 1/2 the channels.

    Three channels take one of their six orders, equally likely. One of the six changes nothing and on its own is not
    flagged (public VDM does).
    """
    images, changed = turn(images, words)
    if images.shape[1] == 3:
        order = np.where(words[:, 2] % 2 == 1, words[:, 2] // 2 % 6, 0)
        for i, channels in enumerate(permutations(range(3))):
            if i:  # the first is the identity
                images[order == i] = images[order == i][:, channels]
        changed = changed | (order > 0)
    return images, changed


# name -> f(images (B, C, H, W), which it may overwrite, and words (B, 4) uint64) -> images, changed (B,)
AUGMENTATIONS: dict[str, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "none": none,
    "flip": flip,
    "turn": turn,
    "vdm": vdm,
}
