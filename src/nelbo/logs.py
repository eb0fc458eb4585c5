"""A run's log: metrics.jsonl for programs and TensorBoard's event files for people, cut back to where a run goes on."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from nelbo import checkpoints

__all__ = ["Log"]


class Log:
    """Appends records to RUN/metrics.jsonl and RUN/tensorboard.

    What a killed run logged after ``step``, from which it continues, is dropped: it will be logged again.
    """

    def __init__(self, run: Path, step: int) -> None:
        self.path, self.step = run / "metrics.jsonl", step
        self.events: Any = None
        kept = []
        for line in self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else ():
            try:
                if json.loads(line)["step"] <= step and line.endswith(b"\n"):
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                break  # a killed run may leave its last line cut off
        checkpoints.write_aside(self.path, b"".join(kept))

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
            folder = self.path.parent / "tensorboard"
            folder.mkdir(exist_ok=True)
            name = f"events.out.tfevents.{int(now)}.{socket.gethostname()}.{os.getpid()}"
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

    def close(self) -> None:
        """Close the event file."""
        if self.events is not None:
            self.events.close()


CURVES = ("learning_rate", "images_per_second", "gradient_norm", "second_order", "error", "fid", "floor")
