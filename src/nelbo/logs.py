"""A run's log: metrics.jsonl for programs and TensorBoard's event files for people, cut back to where a run goes on.

Steps never fall from line to line, so a log is opened from its end, whatever its length, and cut in place, which needs
no room. Whatever was logged when a checkpoint is written is on the disk before it.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nelbo import checkpoints

__all__ = ["Log"]

BLOCK = 2**20  # bytes read at once


class Log:
    """Appends records to RUN/metrics.jsonl and RUN/tensorboard.

    What a killed run logged after ``step``, from which it continues, is dropped: it will be logged again.
    """

    def __init__(self, run: Path, step: int) -> None:
        self.path, self.step = run / "metrics.jsonl", step
        self.events: Any = None
        try:
            with open(self.path, "a+b") as file:
                end = _end(file, step)
                if end < file.seek(0, os.SEEK_END):
                    file.truncate(end)
                os.fsync(file.fileno())
            checkpoints.sync_folder(run)
        except OSError as error:
            raise checkpoints.cannot_write(error, self.path) from error

    def write(self, record: dict[str, Any]) -> None:
        """Append one record: ``kind``, ``step`` and figures; numbers that are not finite become null."""
        try:
            with open(self.path, "ab") as file:
                file.write(checkpoints.to_json(record).encode() + b"\n")
            self._event(record)
        except OSError as error:
            raise checkpoints.cannot_write(error, self.path.parent) from error

    def _event(self, record: dict[str, Any]) -> None:
        """The record's figures for TensorBoard, flushed.

        torch's SummaryWriter is not used: it writes from a thread, which on a full disk dies with a traceback.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        now = time.time()
        if self.events is None:
            folder, files = self.path.parent / "tensorboard", "events.out.tfevents."
            folder.mkdir(exist_ok=True)
            # Files are read in the order of their names, also where another machine's clock is behind.
            times = [int(t) for p in folder.glob(f"{files}*") if (t := p.name.split(".")[3]).isdecimal()]
            name = f"{files}{max(int(now), 1 + max(times, default=0))}.{socket.gethostname()}.{os.getpid()}"
            self.events = RecordWriter(open(folder / name, "ab"))
            self.events.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
            # TensorBoard drops what earlier files hold of later steps.
            start = Event(wall_time=now, step=self.step + 1, session_log=SessionLog(status=SessionLog.START))
            self.events.write(start.SerializeToString())
        figures = {name: value for name, value in record.items() if name in ("bits_per_dim", *CURVES)}
        figures |= record.get("terms", {})
        values = [
            Summary.Value(tag=f"{record['kind']}/{name}", simple_value=v["mean"] if isinstance(v, dict) else v)
            for name, v in figures.items()
        ]
        self.events.write(Event(wall_time=now, step=record["step"], summary=Summary(value=values)).SerializeToString())
        self.events.flush()

    def sync(self) -> None:
        """Bring the lines so far to the disk: before a checkpoint, which continues after them."""
        try:
            with open(self.path, "ab") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise checkpoints.cannot_write(error, self.path) from error

    def close(self) -> None:
        """Close the event file."""
        if self.events is not None:
            with contextlib.suppress(OSError):  # every record was flushed, or its failure has been said
                self.events.close()


def _end(file: BinaryIO, step: int) -> int:
    """The place after the last whole line of a step up to ``step``."""
    for start, line in _backwards(file):
        try:
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                return start + len(line)
        except (ValueError, KeyError, TypeError):
            pass  # a killed run may leave its last line cut off
    return 0


def _backwards(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(where it starts, line) from the last line to the first, a block in memory at a time."""
    position, rest = file.seek(0, os.SEEK_END), b""
    while position:
        size = min(BLOCK, position)
        position -= size
        file.seek(position)
        start = position + size + len(rest)
        first, *lines = (file.read(size) + rest).splitlines(keepends=True)
        for line in reversed(lines):
            start -= len(line)
            yield start, line
        rest = first
    if rest:
        yield 0, rest


CURVES = ("learning_rate", "images_per_second", "gradient_norm", "second_order", "error", "fid", "floor")
