"""Trains a run while killing it. Lives are forked from a process that has torch loaded, and so take little time.

    python tests/killing.py RUN KILLS SEED        (the configuration as JSON on stdin)

Every life is the same training, which continues RUN. Lives are ended by SIGKILL, by turns after a random time, at a
random file operation inside the run's folder (opening, renaming, making and removing: the audit events), at one inside
a checkpoint that is being written, and at one inside a checkpoint that is being removed, until KILLS of them died; the
last one is left alone. After every kill whatever checkpoints there are must load. Prints a JSON object: the kills, and
how many of them left a half-written checkpoint behind.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import PIL.Image  # noqa: F401
import tensorboard.compat.proto.event_pb2
import tensorboard.summary.writer.record_writer  # noqa: F401
import torch

from nelbo import checkpoints
from nelbo.config import Config, from_dict
from nelbo.data import load
from nelbo.training import Trainer, train

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
LONGEST = 0.3  # seconds
MOST = {"anywhere": 60, "saving": 12, "removing": 12}  # operations; a step that saves takes 18: 5 there, 5 there


def live(config: Config, run: Path, mode: str, operations: int) -> None:
    """One life, in a process of its own; in the modes of ``MOST`` it ends itself at the given file operation."""
    left = operations

    def count(event: str, arguments: tuple) -> None:
        nonlocal left
        if event not in EVENTS:
            return
        path = str(arguments[0])
        if mode == "saving" and not (event == "open" and path.startswith(f"{run}/checkpoints/.tmp-")):
            return
        if mode == "removing" and event not in ("os.remove", "os.rmdir"):
            return
        if os.path.isabs(path) and not path.startswith(str(run)):  # relative ones are those of removing a folder
            return
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if mode in MOST:
        sys.addaudithook(count)
    train(config, run, say=lambda line: None)


def main() -> None:
    run, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    config: Config = from_dict(json.load(sys.stdin))
    torch.set_num_threads(1)
    Trainer(config, run, load(config.data.source))  # what a life would load otherwise; no backward pass before a fork
    chance, torn, killed, lives = random.Random(seed), 0, 0, 0
    while True:
        mode = ("time", "anywhere", "saving", "removing")[lives % 4] if killed < kills else ""
        operations, delay = chance.randint(1, MOST.get(mode, 1)), chance.uniform(0, LONGEST)
        lives += 1
        child = os.fork()
        if not child:
            try:
                live(config, run, mode, operations)
                os._exit(0)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
        if mode == "time":
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            break
        assert status == -signal.SIGKILL, f"life {lives} ended with status {status}"
        killed += 1
        torn += any((run / "checkpoints").glob(".tmp-*"))
        for path in checkpoints.list_checkpoints(run):
            found = checkpoints.find_checkpoint(path)
            for name in found.meta["files"]:
                checkpoints.load_tensors(found, name)
        if checkpoints.list_checkpoints(run):
            checkpoints.load_model(run, "last")
            checkpoints.load_model(run, "best")
    print(json.dumps({"kills": killed, "torn": torn}))


if __name__ == "__main__":
    main()
