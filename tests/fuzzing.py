"""Damaged files: mutants of good ones, drawn from a seed."""

import random
from collections.abc import Callable, Iterator, Sequence

__all__ = ["mutants"]

NUMBERS = [
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 40,
    1 << 60,
    (1 << 64) - 1,
]


def mutants(files: Sequence[Sequence[bytes]], count: int, seed: int, words: Sequence[bytes] = ()) -> Iterator[bytes]:
    """Each of one of the files, given as pieces (opcodes, fields), after 1 to 3 changes of its bytes or pieces;
    ``words`` are pieces of the format that may be put in."""
    chance = random.Random(seed)
    pieces = [piece for file in files for piece in file if piece] + list(words)
    for _ in range(count):
        file = list(chance.choice(files))
        for _ in range(chance.randint(0, 2)):
            file = chance.choice(OF_PIECES)(chance, file, pieces)
        content = b"".join(file)
        for _ in range(chance.randint(0, 2)):
            content = chance.choice(OF_BYTES)(chance, content)
        yield content


def somewhere(chance: random.Random, content: Sequence) -> tuple[int, int]:
    """A stretch of the content, which is short as a rule."""
    start = chance.randint(0, len(content))
    return start, min(len(content), start + int(chance.paretovariate(0.7)))


def flip(chance: random.Random, content: bytes) -> bytes:
    i = chance.randrange(max(1, len(content)))
    return content[:i] + bytes(byte ^ 1 << chance.randrange(8) for byte in content[i : i + 1]) + content[i + 1 :]


def substitute(chance: random.Random, content: bytes) -> bytes:
    i, j = somewhere(chance, content)
    return content[:i] + chance.randbytes(j - i) + content[j:]


def number(chance: random.Random, content: bytes) -> bytes:
    """A number that means trouble, over what stood there."""
    size = chance.choice((1, 2, 4, 8))
    value = (chance.choice(NUMBERS) % (1 << 8 * size)).to_bytes(size, chance.choice(("little", "big")))
    i = chance.randint(0, len(content))
    return content[:i] + value + content[i + size :]


def truncate(chance: random.Random, content: bytes) -> bytes:
    return content[: chance.randint(0, len(content))]


def insert(chance: random.Random, content: bytes) -> bytes:
    i = chance.randint(0, len(content))
    return content[:i] + chance.randbytes(chance.randint(1, 9)) + content[i:]


def remove(chance: random.Random, content: bytes) -> bytes:
    i, j = somewhere(chance, content)
    return content[:i] + content[j:]


def double(chance: random.Random, content: bytes) -> bytes:
    i, j = somewhere(chance, content)
    return content[:j] + content[i:j] * chance.choice((1, 1, 2, 50)) + content[j:]


def swap(chance: random.Random, content: bytes) -> bytes:
    i, j, k = sorted(chance.randint(0, len(content)) for _ in range(3))
    return content[:i] + content[j:k] + content[i:j] + content[k:]


def replace_piece(chance: random.Random, file: list[bytes], pieces: list[bytes]) -> list[bytes]:
    i, j = somewhere(chance, file)
    return [*file[:i], chance.choice(pieces), *file[j:]]


def insert_piece(chance: random.Random, file: list[bytes], pieces: list[bytes]) -> list[bytes]:
    i = chance.randint(0, len(file))
    return file[:i] + chance.choices(pieces, k=chance.choice((1, 1, 2, 5))) + file[i:]


def double_pieces(chance: random.Random, file: list[bytes], pieces: list[bytes]) -> list[bytes]:
    i, j = somewhere(chance, file)
    return file[:j] + file[i:j] * chance.choice((1, 1, 2, 50)) + file[j:]


def remove_pieces(chance: random.Random, file: list[bytes], pieces: list[bytes]) -> list[bytes]:
    i, j = somewhere(chance, file)
    return file[:i] + file[j:]


def swap_pieces(chance: random.Random, file: list[bytes], pieces: list[bytes]) -> list[bytes]:
    i, j, k = sorted(chance.randint(0, len(file)) for _ in range(3))
    return file[:i] + file[j:k] + file[i:j] + file[k:]


OF_BYTES: list[Callable[[random.Random, bytes], bytes]] = [
    flip, flip, substitute, number, truncate, insert, remove, double, swap,
]  # fmt: skip
OF_PIECES: list[Callable[[random.Random, list[bytes], list[bytes]], list[bytes]]] = [
    replace_piece, insert_piece, double_pieces, remove_pieces, swap_pieces,
]  # fmt: skip
