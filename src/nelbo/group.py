"""Several processes that do one piece of work: who does what, what all of them know in the end, and who is lost.

They are launched by ``accelerate launch``, ``torchrun`` or Slurm's ``srun``, which tell each its RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR and MASTER_PORT. On CPUs they talk by gloo, on GPUs by NCCL.

Work is cut into numbered units (a batch of an evaluation, a shard of samples) that do not depend on the number of
processes. Each is done by the process that asks next, so nobody waits for a slow one. What they found is added up where
every entry has one term that is not 0: the result is to the last bit that of one process.

A thread of every process says every few seconds that it is alive. One that was killed, or whose machine is gone, is
missed after ``LOST`` seconds; one that ends with an error says which. The others then stop, and one line says why.
"""

import atexit
import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nelbo.errors import UserError
from nelbo.stopping import RESUME, TEMPORARY

__all__ = ["ALONE", "Group", "join", "joined"]

BEAT, LOST = 2.0, 30.0  # seconds


class Group:
    """The processes of one command: this one's ``rank`` in 0 .. count - 1; the first is the main one, which writes.

    ``store``: a torch.distributed.Store that all of them reach; None for one process.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None) -> None:
        self.rank, self.count, self.store = rank, count, store
        self.queues = 0
        self.ending = threading.Lock()  # whoever holds it says the last line
        self.over = threading.Event()
        if store is not None:
            self.watch = threading.Thread(target=self._watch, args=(store.clone(),), daemon=True, name="nelbo-watch")
            self.watch.start()

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    # Work ------------------------------------------------------------------------------------------------------------

    def units(self, count: int) -> Iterator[int]:
        """The numbers 0 .. count - 1, in order, each for one process only: whichever asks next. All processes must
        iterate, in the same order of calls."""
        if self.count == 1:
            yield from range(count)
            return
        self.queues += 1
        while (number := self.store.add(f"queue/{self.queues}", 1) - 1) < count:
            yield number

    def merge(self, *arrays: np.ndarray) -> None:
        """Add up, in place, arrays of numbers of which each entry is 0 but in one process."""
        if self.count > 1:
            for array in arrays:
                dist.all_reduce(torch.from_numpy(array))

    def tell(self, value: Any) -> Any:
        """The main process's value, in all of them."""
        if self.count == 1:
            return value
        said = [value]
        dist.broadcast_object_list(said, 0, device=torch.device("cpu"))
        return said[0]

    def ask(self, value: Any) -> list[Any]:
        """Everybody's value, in the order of ranks."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def agree(self, value: Any, what: str) -> None:
        """UserError where ``value`` is not the same in all processes; ``what`` it is, for people."""
        if any(theirs != value for theirs in self.ask(value)):
            raise UserError(f"the processes see different {what}: they changed just now, or file systems differ")

    def wait(self) -> None:
        """Go on when all have come here."""
        self.merge(np.zeros(1))

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """The main process does what is inside, then the others do."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()

    # Life ------------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """The end of the work: wait for the others, and stop watching them."""
        if self.store is None or self.over.is_set():
            return
        self.wait()
        self._unwatch()
        self.store.add("closed", 1)
        if self.main:  # which may hold the store
            self._until(lambda: self.store.add("closed", 0) == self.count)
        dist.destroy_process_group()

    def fail(self, message: str, status: int) -> bool:
        """Tell the others that this process ends with an error; says whether it is the one to print the message.

        The main process prints its own and, with their number, those of others: one line for all.
        """
        if self.store is None or self.over.is_set():
            return True
        if not self.ending.acquire(blocking=False):
            threading.Event().wait(LOST)  # the thread that watches is ending this process
        self._unwatch()
        try:
            self.store.set(f"left/{self.rank}", f"{status} {message}")
            if self.main:
                self._until(lambda: self.store.add("heard", 0) >= self.count - 1)
                return True
            if self._until(lambda: self.store.check(["left/0"])):
                self.store.add("heard", 1)
                return False
        except RuntimeError:  # the store is gone, and the main process with it
            pass
        return True

    def cut_off(self) -> None:
        """Where a message to another process failed: give the thread that watches the time to find out why."""
        if self.store is not None:
            self.over.wait(2 * BEAT + 1)

    def _unwatch(self) -> None:
        """End the thread that watches. One that is in torch when the interpreter ends is aborted, and all with it."""
        self.over.set()
        self.watch.join(2 * BEAT + 1)

    def _until(self, reached: Any) -> bool:
        """Whether it was within a few seconds."""
        end = time.monotonic() + 2 * BEAT + 1
        while not (found := reached()) and time.monotonic() < end:
            time.sleep(0.05)
        return bool(found)

    def _watch(self, store: Any) -> None:
        """Say that this process is alive, and end it where another is not. The main one watches all, all watch it."""
        others = range(1, self.count) if self.main else range(1)
        seen = dict.fromkeys(others, ("", time.monotonic()))
        beat = 0
        while not self.over.wait(BEAT):
            beat += 1
            try:
                store.set(f"alive/{self.rank}", str(beat))
                for rank in others:
                    if store.check([f"left/{rank}"]):
                        status, message = store.get(f"left/{rank}").decode().split(" ", 1)
                        self._end(f"process {rank} of {self.count}: {message}" if self.main else "", int(status))
                    now = store.get(f"alive/{rank}").decode() if store.check([f"alive/{rank}"]) else ""
                    if now != seen[rank][0]:
                        seen[rank] = now, time.monotonic()
                    elif time.monotonic() - seen[rank][1] > LOST:
                        self._end(f"process {rank} of {self.count} has died or does not answer; {RESUME}", TEMPORARY)
            except RuntimeError:  # torch's, of a store whose host is gone
                self._end(f"the first of {self.count} processes, or what launched it, is gone; {RESUME}", TEMPORARY)

    def _end(self, line: str, status: int) -> None:
        """End this process from the thread that watches, whatever it is doing; nothing that is saved is lost."""
        if self.over.is_set() or not self.ending.acquire(blocking=False):
            return
        with contextlib.suppress(RuntimeError):
            if self.main:
                self.store.set("left/0", f"{status} {line}")
            else:
                self.store.add("heard", 1)
        if line:
            print(f"nelbo: {line}", file=sys.stderr)
        if self.main:
            with contextlib.suppress(RuntimeError):
                self._until(lambda: self.store.add("heard", 0) >= self.count - 1)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


ALONE = Group()
_joined = ALONE


def joined() -> Group:
    """The group that this process has joined; ``ALONE`` where it has joined none."""
    return _joined


def join(device: Any = None) -> Group:
    """The group of the processes launched together, which all call this before anything that may fail in one of them;
    ``ALONE`` where there is only one.

    ``device``: what this process will compute on; by default a GPU where there is one. Raises UserError where the
    others do not come.
    """
    global _joined
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if _joined is not ALONE or count == 1:
        return _joined
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is {count}, and {', '.join(missing)} not set: launch with torchrun or accelerate")
    rank = int(os.environ["RANK"])
    gpu = str(device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, count, timeout=timedelta(minutes=5)))
        # A launcher that starts all of them anew keeps the store: what the dead have left there is not for these.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        # Waiting is never cut short: who is lost is found out by the thread that watches.
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timedelta(days=30))
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"process {rank} of {count} did not find the others at {os.environ['MASTER_ADDR']}:"
                        f"{os.environ['MASTER_PORT']} ({reason})") from None  # fmt: skip
    _joined = Group(rank, count, store)
    atexit.register(_leave, _joined)
    return _joined


def _leave(group: Group) -> None:
    """At the end of a script: wait for the others, unless it ends with an error."""
    error = getattr(sys, "last_value", None)
    with contextlib.suppress(RuntimeError):
        if error is None:
            group.close()
        else:
            group.fail(f"{type(error).__name__}: {error}", 1)
