"""Several processes: they do what one does, to the last bit where nothing is averaged over them, and none waits for the
dead."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from group_work import work
from nelbo import checkpoints
from nelbo.errors import UserError
from nelbo.group import ALONE, LOST, Group, join
from nelbo.stopping import TEMPORARY
from nelbo.training import train
from tiny import change, files, flags, metrics, tiny

HERE = Path(__file__).parent
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {
    "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(HERE),
}  # fmt: skip
NELBO = [sys.executable, "-m", "nelbo.cli"]
ODE = ["--method", "ode", "--solver", "bosh3", "--rtol", "0.03", "--atol", "0.03"]


class Started:
    """Processes of groups, started as srun starts them: nothing watches them but themselves. None outlives the test."""

    def __init__(self) -> None:
        self.all: list[subprocess.Popen[str]] = []

    def __call__(self, command: list[Any], count: int, **variables: str) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        common = {**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), **variables}
        group = [
            subprocess.Popen(
                list(map(str, command)), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(count)
        ]  # fmt: skip
        self.all += group
        return group


@pytest.fixture
def start() -> Iterator[Started]:
    started = Started()
    yield started
    for process in started.all:
        process.kill()
        process.communicate()


def finish(processes: list[subprocess.Popen[str]], seconds: float = 240) -> list[tuple[int, str, str]]:
    """Status, stdout and stderr of each."""
    ended = [process.communicate(timeout=seconds) for process in processes]
    return [(process.returncode, *said) for process, said in zip(processes, ended, strict=True)]


def wait_for(path: Path, pattern: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not list(path.glob(pattern)):
        assert time.monotonic() < end, f"no {pattern} in {path}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny("mulan-digits", training__evaluate_every=0), tmp_path_factory.mktemp("one") / "run", say=str)


def the_same_work(expected: dict[str, Any], one: Path, several: Path, count: int) -> None:
    """What so many processes found and wrote of ``work`` is, to the last bit, what one did."""
    for rank in range(count):
        with np.load(several / f"found-{rank}.npz") as found:
            assert set(found) == set(expected)
            for name, values in expected.items():
                np.testing.assert_array_equal(found[name], values, err_msg=name)
    ours, theirs = files(one), files(several)
    assert set(theirs) - set(ours) == {f"found-{rank}.npz" for rank in range(count)}
    assert set(ours) <= set(theirs)
    for name, content in ours.items():
        if name.endswith((".npz", ".png")):
            assert theirs[name] == content, name


def test_figures_and_samples_of_several_processes_are_exactly_those_of_one(
    start: Started, run: Path, tmp_path: Path
) -> None:
    """The bound, the dense bound, the ODE with one draw and with three, samples in one file and in shards, FID."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        (tmp_path / "one").mkdir()
        expected = work(run, tmp_path / "one")
    finally:
        torch.set_num_threads(before)
    ended = finish(start([sys.executable, HERE / "group_work.py", run, tmp_path / "three"], 3))
    assert [status for status, _, _ in ended] == [0, 0, 0], ended
    the_same_work(expected, tmp_path / "one", tmp_path / "three", 3)


def losses(folder: Path) -> list[tuple[float, float]]:
    return [(m["bits_per_dim"], m["gradient_norm"]) for m in metrics(folder) if m["kind"] == "train"]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("mulan-digits", {"network.dropout": 0.3, "training.accumulate": 2}),
        ("ddpm-digits", {"network.self_condition": True}),
    ],
)
def test_two_processes_train_what_one_does(start: Started, name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """The first 20 losses to 1e-5: times stratified over both and over parts, noise and dropout by example. After a
    stop one process goes on alone."""
    more = {"training.steps": 20, "training.log_every": 1, "training.batch": 16, "training.save_every": 16 * 15}
    config = change(tiny(name), fields | more)
    whole = losses(train(config, tmp_path / "one", say=str))
    shorter = flags(change(config, {"training.steps": 15}))
    ended = finish(start([*NELBO, "train", name, "--out", tmp_path / "two", *shorter], 2))
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert "2 processes" in ended[0][1] and ended[1][1:] == ("", "")
    train(config, tmp_path / "two", say=str)
    found = losses(tmp_path / "two")
    assert len(whole) == len(found) == 20
    np.testing.assert_allclose([b for b, _ in found], [b for b, _ in whole], rtol=1e-5)
    np.testing.assert_allclose([g for _, g in found], [g for _, g in whole], rtol=2e-4)


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_where_one_is_killed_the_other_stops_and_the_same_command_goes_on(
    start: Started, killed: int, run: Path, tmp_path: Path
) -> None:
    command = ["evaluate", run, *ODE, "--images", 16, "--batch", 1]
    group = start([*NELBO, *command, "--out", tmp_path / "two"], 2)
    for name in (".*-16.npz", ".*-16.1.npz"):
        wait_for(tmp_path / "two", f"evaluations/{name}")
    begun = time.monotonic()
    group[killed].send_signal(signal.SIGKILL)
    ended = finish(group)
    assert time.monotonic() - begun < LOST + 30
    status, _, said = ended[1 - killed]
    lines = [line for line in said.splitlines() if line.startswith("nelbo: ")]
    assert status == TEMPORARY and len(lines) == 1 and "Traceback" not in said, said
    assert "the same command goes on from what is saved, also with another number of processes" in lines[0]
    solved = [np.load(path)["prior"] for path in (tmp_path / "two" / "evaluations").glob(".*-16*.npz")]
    assert all(not np.isnan(s).all() and np.isnan(s).any() for s in solved) and len(solved) == 2
    for out in ("two", "one"):  # alone
        done = subprocess.run(
            [*NELBO, *map(str, command), "--out", tmp_path / out], env=ENVIRONMENT, check=False, capture_output=True
        )
        assert done.returncode == 0, done.stderr
    (a,), (b,) = (sorted((tmp_path / out / "evaluations").glob("*.npz")) for out in ("one", "two"))
    assert a.read_bytes() == b.read_bytes()
    assert not list((tmp_path / "two" / "evaluations").glob(".*-16*.npz"))


@pytest.mark.parametrize(
    "name", ["mulan-digits", *(pytest.param(n, marks=pytest.mark.slow) for n in ("ddpm-digits", "vdm-digits"))]
)
def test_sharded_training_is_the_same_and_its_checkpoints_load_on_any_number_of_processes(
    start: Started, name: str, tmp_path: Path
) -> None:
    """Three processes hold a third each, two go on with halves, one ends alone; against one process all the way."""
    more = {"training.steps": 12, "training.log_every": 1, "training.batch": 12, "training.save_every": 12 * 4}
    more |= {"training.accumulate": 2, "network.dropout": 0.2, "training.evaluate_every": 12 * 8}
    config = change(tiny(name), more)
    whole = train(config, tmp_path / "one", say=str)
    for count, steps in ((3, 4), (2, 8)):
        now = change(config, {"training.steps": steps, "training.sharding": "full"})
        command = [*NELBO, "train", name, "--out", tmp_path / "many", *flags(now)]
        ended = finish(start(command, count))
        assert [status for status, _, _ in ended] == [0] * count, ended
        held = checkpoints.read_checkpoint(tmp_path / "many")
        assert held.meta["pieces"] == count and len(held.meta["files"]) == 3 * count
    train(config, tmp_path / "many", say=str)
    assert "pieces" not in checkpoints.read_checkpoint(tmp_path / "many").meta
    for (b, g), (expected_b, expected_g) in zip(losses(tmp_path / "many"), losses(whole), strict=True):
        assert b == pytest.approx(expected_b, rel=1e-5) and g == pytest.approx(expected_g, rel=5e-4)
    figures = [
        {m["step"]: m["bits_per_dim"]["mean"] for m in metrics(tmp_path / r) if m["kind"] == "evaluation"}
        for r in ("many", "one")
    ]
    for step in (8, 12):
        assert figures[0][step] == pytest.approx(figures[1][step], rel=1e-5)
    a, b = (checkpoints.load_model(tmp_path / r, 8).state_dict() for r in ("many", "one"))
    for key, value in a.items():
        np.testing.assert_allclose(value, b[key], rtol=1e-3, atol=1e-4, err_msg=key)


def test_where_one_is_killed_training_stops_and_goes_on(start: Started, tmp_path: Path) -> None:
    config = tiny("mulan-digits", training__steps=2000, training__batch=12, training__evaluate_every=0)
    command = ["train", "mulan-digits", "--out", tmp_path / "run", *flags(config)]
    group = start([*NELBO, *command], 3)
    wait_for(tmp_path / "run", "checkpoints/step-*")
    group[2].send_signal(signal.SIGKILL)
    ended = finish(group, LOST + 30)
    assert [status for status, _, _ in ended[:2]] == [TEMPORARY] * 2
    lines = [line for _, _, said in ended for line in said.splitlines() if line.startswith("nelbo: ")]
    assert len(lines) == 1 and "the same command goes on" in lines[0], ended
    assert not any("Traceback" in said for _, _, said in ended)
    last = checkpoints.read_checkpoint(tmp_path / "run").step
    train(change(config, {"training.steps": last + 3}), tmp_path / "run", say=str)
    assert checkpoints.read_checkpoint(tmp_path / "run").step == last + 3


def test_a_mistake_of_all_and_one_of_a_single_process_are_one_line(start: Started, run: Path, tmp_path: Path) -> None:
    ended = finish(start([*NELBO, "evaluate", run, "--images", 10**6], 2))
    assert [status for status, _, _ in ended] == [2, 2]
    assert "".join(said for _, _, said in ended) == (
        "nelbo: --images must lie in 1 .. 300 for this split, got 1000000\n"
    ), ended
    # Each machine has images of its own: the second process's is damaged.
    program = (
        "import os, sys; from nelbo import cli; run, out, images = sys.argv[1:]; "
        "images += os.environ['RANK'] + '.npz'; "
        "sys.exit(cli.main(['evaluate', run, '--out', out, '--split', 'train', '--data', images]))"
    )
    np.savez(tmp_path / "images0.npz", images=np.zeros((40, 1, 8, 8), np.uint8), levels=17)
    (tmp_path / "images1.npz").write_bytes(b"nothing")
    ended = finish(start([sys.executable, "-c", program, run, tmp_path / "out", tmp_path / "images"], 2))
    assert [status for status, _, _ in ended] == [2, 2]
    said = "".join(said for _, _, said in ended)
    assert said.startswith("nelbo: process 1 of 2: ") and "images1.npz" in said and said.count("\n") == 1, ended


def test_processes_that_see_other_weights_do_not_mix_their_figures(start: Started, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run0")
    train(tiny("mulan-digits", training__evaluate_every=0, training__seed=7), tmp_path / "run1", say=str)
    program = (
        "import os, sys; from nelbo import cli; verb, run, *options = sys.argv[1:]; "
        "sys.exit(cli.main([verb, run + os.environ['RANK'], '--out', run, *options]))"
    )
    for command in (
        ("evaluate", tmp_path / "run", "--images", 2), ("sample", tmp_path / "run", "--count", 2, "--steps", 2),
        ("fid", tmp_path / "run", "--extractor", "random", "--count", 4, "--steps", 2),
    ):  # fmt: skip
        ended = finish(start([sys.executable, "-c", program, *command], 2))
        assert [status for status, _, _ in ended] == [2, 2], ended
        said = "".join(said for _, _, said in ended)
        assert "the processes see different weights of " in said and said.count("nelbo: ") == 1, said


@pytest.mark.parametrize("how", ["close", "fail"])
def test_the_thread_that_watches_ends_before_its_process_may(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is in a call of torch when the interpreter ends would be aborted, and the process with it."""
    import torch.distributed as dist

    def slowly(self: Group, store: Any) -> None:
        self.over.wait()
        time.sleep(0.3)

    monkeypatch.setattr(Group, "_watch", slowly)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    group = Group(0, 1, dist.HashStore())
    group.close() if how == "close" else group.fail("reason", 2)
    assert not group.watch.is_alive()


def test_a_group_needs_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is 2, and RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"):
        join()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join() is ALONE


def test_one_process_does_all_units_in_order() -> None:
    array = np.arange(3.0)
    ALONE.merge(array)
    assert list(ALONE.units(4)) == [0, 1, 2, 3] and array.tolist() == [0, 1, 2]
    assert (ALONE.main, ALONE.tell(7), ALONE.ask("a")) == (True, 7, ["a"])
