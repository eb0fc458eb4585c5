"""Leaving cleanly when a signal asks for it; and what is said and returned where the same command may go on."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["RESUME", "TEMPORARY", "Stopped", "listen"]

TEMPORARY = 75  # exit status where another process was lost (EX_TEMPFAIL of sysexits.h)
RESUME = "the same command goes on from what is saved, also with another number of processes"


class Stopped(Exception):
    """A run was asked to stop by a signal, and saved. ``status`` is the exit status that shells expect."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {step}, saved; the same command continues"
        )
        self.status = 128 + number


@contextlib.contextmanager
def listen() -> Iterator[list[int]]:
    """The SIGINT and SIGTERM that come meanwhile; a second one of a kind acts as it did before.

    Only the main thread may listen; elsewhere the list stays empty.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def remember(number: int, _: Any) -> None:
        caught.append(number)
        signal.signal(number, before[number])

    before = {int(number): signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
