"""Disks that fail at any one operation, and file systems with habits of their own: nothing that was complete is lost.

Faults are raised by the calls that reach the system (open, write, flush, fsync, close, truncate, mkdir, replace,
unlink, rmdir) inside one folder, at the k-th of them, for every k.
"""

import builtins
import contextlib
import errno
import fcntl
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nelbo import checkpoints, evaluation, pictures
from nelbo.errors import UserError
from nelbo.logs import Log
from nelbo.training import Trainer, train
from tiny import entries, files, flags, log_line, outcome, tiny

quiet: dict[str, Any] = {"say": lambda line: None}
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
GROWS = {"open", "write", "flush", "close", "fsync", "mkdir", "replace"}  # what a full disk refuses


class Faults:
    """Inside, the ``at``-th operation in ``folder`` fails with ``code``; with ``lasting`` all later ones too.

    A disk that is full refuses what needs room, a stale or read-only one everything. A write that fails has written
    half of what it was given.
    """

    def __init__(self, folder: Path, at: int, code: int, lasting: bool = True) -> None:
        self.folder, self.at, self.code, self.lasting = str(folder), at, code, lasting
        self.calls = 0
        self.names: dict[int, str] = {}  # descriptor -> path, of folders and files opened here
        self.only = GROWS if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else None

    @property
    def failed(self) -> bool:
        """Whether it came to a failure."""
        return self.calls >= self.at

    def hit(self, name: str, path: Any) -> None:
        """Count an operation, and fail where its turn has come."""
        if not str(path).startswith(self.folder) or (self.only and name not in self.only):
            return
        self.calls += 1
        if self.calls == self.at or (self.lasting and self.calls > self.at):
            raise OSError(self.code, os.strerror(self.code))

    def __enter__(self) -> "Faults":
        patch = self.patch = pytest.MonkeyPatch()
        real_open, faults = builtins.open, self

        def opened(path: Any, mode: str = "r", *rest: Any, **keywords: Any) -> Any:
            writes = isinstance(path, (str, Path)) and set(mode) & set("wax+")
            if writes:
                faults.hit("open", path)
            file = real_open(path, mode, *rest, **keywords)
            return File(file, str(path), faults) if writes else file

        patch.setattr(builtins, "open", opened)
        for name in ("mkdir", "replace", "unlink", "rmdir"):
            patch.setattr(os, name, self.wrapped(name, getattr(os, name)))
        real_fsync = os.fsync

        def fsync(descriptor: int) -> None:
            faults.hit("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            real_fsync(descriptor)

        patch.setattr(os, "fsync", fsync)
        return self

    def wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """A call of os that counts; a path relative to an open folder is that of removing a folder."""

        def call(path: Any, *rest: Any, **keywords: Any) -> Any:
            where = path
            if (folder := keywords.get("dir_fd")) is not None:
                where = Path(os.readlink(f"/proc/self/fd/{folder}")) / path
            self.hit(name, where)
            return real(path, *rest, **keywords)

        return call

    def __exit__(self, *_: Any) -> None:
        self.patch.undo()


class File:
    """A file opened for writing whose operations count."""

    def __init__(self, file: Any, path: str, faults: Faults) -> None:
        self.file, self.path, self.faults = file, path, faults

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def write(self, content: Any) -> int:
        try:
            self.faults.hit("write", self.path)
        except OSError:
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            raise
        return int(self.file.write(content))

    def flush(self) -> None:
        self.faults.hit("flush", self.path)
        self.file.flush()

    def truncate(self, size: int) -> int:
        self.faults.hit("truncate", self.path)
        return int(self.file.truncate(size))

    def close(self) -> None:
        try:
            self.faults.hit("close", self.path)
        finally:
            self.file.close()


KINDS = {  # name -> error, and whether it lasts
    "full": (errno.ENOSPC, True),
    "quota": (errno.EDQUOT, True),
    "read-only": (errno.EROFS, True),
    "stale": (errno.ESTALE, True),
    "input/output error, once": (errno.EIO, False),
    "stale, once": (errno.ESTALE, False),
}


def every_fault(folder: Path, kind: str, do: Callable[[], Any]) -> Iterator[tuple[int, UserError | None]]:
    """Carry ``do`` out with the first operation failing, then with the second, and so on until none does; each time
    (which, the UserError that it ended with or None where it went on). No other exception is let pass."""
    code, lasting = KINDS[kind]
    for k in itertools.count(1):
        with Faults(folder, k, code, lasting) as faults:
            try:
                do()
                error = None
            except UserError as raised:
                error = raised
                assert os.strerror(code) in str(raised) and "\n" not in str(raised)
                assert str(raised).endswith("; what was complete before is kept")
        if not faults.failed:
            assert error is None
            return
        yield k, error


def whole(run: Path) -> dict[str, bytes]:
    """The files of all complete checkpoints, after their sizes and SHA-256 were checked."""
    for path in checkpoints.list_checkpoints(run):
        found = checkpoints.find_checkpoint(path)
        for name in found.meta["files"]:
            checkpoints.load_tensors(found, name)
    return {name: content for name, content in files(run).items() if name.startswith("checkpoints/step-")}


def save(run: Path, step: int, keep: int = 2) -> None:
    x = {f"{name}.safetensors": {"x": torch.full((300,), float(step + i))} for i, name in enumerate("ab")}
    checkpoints.save_checkpoint(run, x, {"step": step, "best": {"step": 1, "bits_per_dim": 1.0}}, keep)


# Faults at every operation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_saved_or_not_whichever_operation_fails(kind: str, tmp_path: Path) -> None:
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    for step in (1, 2, 3):  # the third takes the second's place; the first is the best
        save(undisturbed, step, keep=1)
        save(run, step, keep=1) if step < 3 else None
    before, after = whole(run), whole(undisturbed)
    start, outcomes = entries(run), set()
    for _, error in every_fault(run, kind, lambda: save(run, 3, keep=1)):
        found = whole(run)
        assert before.items() <= found.items() or found == after
        if error is None:  # only the removal of old ones failed
            assert after.items() <= found.items()
        outcomes.add((error is None, found == before))
        save(run, 3, keep=1)  # there is room again, and leftovers are in the way
        assert whole(run) == after
        checkpoints.clean_up(run)
        assert {name for name in entries(run) if "/." in name} == set()
        shutil.rmtree(run)
        for name, content in start.items():
            (run / name).mkdir(parents=True) if content is None else (run / name).write_bytes(content)
    assert (False, True) in outcomes


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_the_old_or_the_new_whichever_operation_fails(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "evaluations" / "file.json"
    failures = 0
    for _, error in every_fault(tmp_path, kind, lambda: checkpoints.write_aside(path, "new")):
        failures += 1
        assert error is not None
        assert not path.exists() or path.read_text() in ("old", "new")
        checkpoints.write_aside(path, "old")
        assert path.read_text() == "old"
    assert failures >= 5 and path.read_text() == "new"


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_belong_together_stay_together_whichever_operation_fails(kind: str, tmp_path: Path) -> None:
    figures, images = tmp_path / "evaluations" / "bound.json", tmp_path / "evaluations" / "bound.npz"

    def write(what: str) -> None:
        checkpoints.write_together({images: what, figures: what.encode()})

    found = []
    for _, error in every_fault(tmp_path, kind, lambda: write("new")):
        assert error is not None
        found.append([path.read_text() if path.exists() else "none" for path in (images, figures)])
        write("old")
        kept = dict.fromkeys(("evaluations/bound.json", "evaluations/bound.npz"), b"old")
        assert entries(tmp_path) == {"evaluations": None, **kept}
    # A failure between the two renames: then the last of them does not vouch for the first.
    assert [texts for texts in found if texts[0] != texts[1]] in ([], 2 * [["new", "old"]])
    assert ["old", "old"] in found and ["new", "new"] in found and figures.read_text() == images.read_text() == "new"


def test_figures_and_samples_stay_with_their_arrays_on_a_full_disk(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny(training__steps=1), run, **quiet)

    def evaluate() -> Path:
        return evaluation.evaluate(run, evaluation.Settings(images=2, times=1)).path

    def draw() -> Path:
        return pictures.save_samples(run / "samples" / "one", np.zeros((1, 1, 4, 4), np.uint8), 17)[1]

    for do in (evaluate, draw):
        last = do()
        first, states = last.with_suffix(".npz"), []
        for old in (first, last):
            old.write_text("old")
        for _ in every_fault(last.parent, "full", do):
            states.append([path.read_bytes() != b"old" for path in (first, last)])
            for old in (first, last):
                old.write_text("old")
        assert [False, False] in states and [False, True] not in states
        assert states.count([True, False]) <= 2  # between the two renames


@pytest.mark.parametrize("kind", KINDS)
def test_a_log_keeps_its_lines_whichever_operation_fails(kind: str, tmp_path: Path) -> None:
    def lines() -> list[int]:
        return [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")[:-1]]

    def life() -> None:
        with contextlib.closing(Log(tmp_path, 5)) as log:
            for step in (6, 7):
                log.write(log_line(step))
            log.sync()

    with contextlib.closing(Log(tmp_path, 0)) as log:
        for step in range(1, 8):
            log.write(log_line(step))
    failures = 0
    for _, error in every_fault(tmp_path, kind, life):
        failures += 1
        assert error is not None or lines() == [1, 2, 3, 4, 5, 6, 7]  # all but closing the events must succeed
        kept = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        assert [json.loads(line)["step"] for line in kept[:5]] == [1, 2, 3, 4, 5] and kept[4].endswith(b"\n")
    assert failures > 12 and lines() == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("kind", ["full", "input/output error, once"])
def test_a_training_ends_the_same_whichever_operation_failed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Life after life in one folder, the k-th of which ends at its k-th operation; anew after one that went on."""
    monkeypatch.setattr(Trainer, "memory", lambda self: {"weights": 0, "activations": 0})
    config = tiny(training__steps=4, training__log_every=1, training__save_every=16, training__keep=9)
    run = tmp_path / "run"
    train(config, tmp_path / "undisturbed", **quiet)
    expected, kept, stopped = outcome(tmp_path / "undisturbed"), whole(run), 0
    for _, error in every_fault(run, kind, lambda: train(config, run, **quiet)):
        found = whole(run)
        assert kept.items() <= found.items()
        kept = found
        if error is None:
            assert outcome(run) == expected
            shutil.rmtree(run)
            kept = {}
        stopped += error is not None
    assert stopped > 30
    assert outcome(run) == expected


# File systems with habits of their own -------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF, errno.ENOTSUP])
def test_folders_that_cannot_be_synchronised_are_no_failure(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, asked = os.fsync, 0

    def refuse(descriptor: int) -> None:
        nonlocal asked
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            asked += 1
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    save(tmp_path, 1)
    checkpoints.write_aside(tmp_path / "file", "x")
    Log(tmp_path, 0).close()
    assert asked == 5 and whole(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EWOULDBLOCK])
def test_a_file_system_without_locks_serves(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with contextlib.ExitStack() as stack:
        if code == errno.EWOULDBLOCK:
            with pytest.raises(UserError, match="another process is training"):
                stack.enter_context(checkpoints.locked(tmp_path))
        else:
            stack.enter_context(checkpoints.locked(tmp_path))


def test_files_that_are_open_elsewhere_stay_as_nfs_files_and_are_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a network file system, removing a file that is open renames it; its folder cannot be removed until then."""
    number = itertools.count()

    def silly(path: Any, *, dir_fd: int | None = None) -> None:
        folder, name = os.path.split(os.fspath(path))
        if name.startswith(".nfs"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        other = os.path.join(folder, f".nfs{next(number):04d}")
        os.rename(path, other, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", silly)
        for step in (2, 3, 3, 4):  # 3 twice: the first is in the way, and so is what is left of its removal
            save(run, step, keep=1)
        save(run, 5, keep=1)
        with Faults(run, 4, errno.ENOSPC), pytest.raises(UserError, match="No space left"):
            save(run, 6)
        assert [name for name in entries(run) if "/.tmp" in name]  # a folder that cannot be removed
        save(run, 6, keep=1)
        assert [p.name for p in checkpoints.list_checkpoints(run)] == ["step-000000006"]
        whole(run)
        checkpoints.clean_up(run)  # to no avail yet
        assert any(".nfs" in name for name in entries(run))
    for path in run.glob("checkpoints/.*/.nfs*"):  # closed at last
        path.unlink()
    checkpoints.clean_up(run)
    assert not [name for name in entries(run) if "/." in name]
    assert {Path(name).parent.name for name in whole(run)} == {"step-000000006"}


def test_a_rename_that_happened_and_was_said_to_have_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer was lost, and the file system asked again: the name was gone by then."""
    replace = os.replace

    def lost(source: Any, target: Any) -> None:
        replace(source, target)
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))

    save(tmp_path, 1)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lost)
        with pytest.raises(UserError, match="step-000000002: No such file"):
            save(tmp_path, 2)
        with pytest.raises(UserError, match="No such file"):
            checkpoints.write_aside(tmp_path / "file", "new")
    whole(tmp_path)
    assert checkpoints.read_checkpoint(tmp_path).step == 2 and (tmp_path / "file").read_text() == "new"
    save(tmp_path, 3)
    assert [p.name[-1] for p in checkpoints.list_checkpoints(tmp_path)] == ["1", "2", "3"]


@pytest.mark.parametrize("seen", ["without the new one", "with those that are gone"])
def test_a_folder_that_is_listed_as_it_was_a_moment_ago(
    seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    list_all, gone = checkpoints.list_checkpoints, tmp_path / "checkpoints" / "step-000000002"

    def late(run: Path) -> list[Path]:
        return list_all(run)[:-1] if seen == "without the new one" else [gone, *list_all(run)]

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "list_checkpoints", late)
        save(tmp_path, 5)
    kept = [1, 3, 4, 5] if seen == "without the new one" else [1, 4, 5]  # 1 is the best; one too many does no harm
    assert [int(p.name[5:]) for p in list_all(tmp_path)] == kept
    whole(tmp_path)


def test_clocks_that_disagree_change_nothing(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for step in (1, 2, 3):
        save(tmp_path, step, keep=9)
        os.utime(tmp_path / "checkpoints" / f"step-{step:09d}", (2e9 - step, 2e9 - step))
    assert checkpoints.read_checkpoint(tmp_path).step == 3
    folder = tmp_path / "tensorboard"
    names = [f"events.out.tfevents.{2_000_000_000 + i}.x" for i in range(4)]
    for step in (1, 2, 3):  # each life on a machine whose clock is behind that of the one before
        with contextlib.closing(Log(tmp_path, step - 1)) as log:
            log.write(log_line(step))
        (name,) = set(entries(folder)) - set(names)
        assert step == 1 or int(name.split(".")[3]) == 2_000_000_000 + step
        os.rename(folder / name, folder / names[step])
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [e.step for e in events.Scalars("train/bits_per_dim")] == [1, 2, 3]


def test_a_disk_that_was_full_and_has_room_again(tmp_path: Path) -> None:
    """A real file system of 600 KiB, where the user may mount one, grown while nothing runs."""
    small = tmp_path / "small"
    small.mkdir()
    mount = f"mount -t tmpfs -o size=600k none {small}"
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "sh", "-c", mount], check=False).returncode:
        pytest.skip("needs the right to mount")
    config = tiny(training__keep=9, training__evaluate_every=0)
    options = ["-m", "nelbo.cli", "train", "vdm-digits", "--out", str(small / "run"), *flags(config)]
    command = shlex.join([sys.executable, *options])
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{mount} && {command}; echo $?; cp -r {small}/run {tmp_path}/full; "
         f"mount -o remount,size=9m {small} && {command}; echo $?; cp -r {small}/run {tmp_path}/run"],
        capture_output=True, text=True, env=ONE_THREAD, check=False,
    )  # fmt: skip
    assert [line for line in done.stdout.splitlines() if line.isdigit()] == ["2", "0"]
    kept = whole(tmp_path / "full")
    assert kept and kept.items() <= whole(tmp_path / "run").items()
    train(config, tmp_path / "undisturbed", preset="vdm-digits", **quiet)
    ours, theirs = outcome(tmp_path / "run"), outcome(tmp_path / "undisturbed")
    assert {k: v for k, v in ours.items() if k != "run.json"} == {k: v for k, v in theirs.items() if k != "run.json"}
