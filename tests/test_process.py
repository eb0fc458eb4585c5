"""How a process uses cores and memory: threads that wait, and memory that is kept."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from nelbo.process import choose_waiting, others

IDLE, BUSY = {"GOMP_SPINCOUNT": "3000"}, {"OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.parametrize(
    ("average", "running", "set_by_user", "expected"),
    [
        (0.0, 1, {}, IDLE),
        (100.0, 1, {}, IDLE),  # what ran before is over
        (0.0, 2, {}, BUSY),  # on two cores; it has just started
        (100.0, 9, {}, BUSY),
        (100.0, 9, {"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        (0.0, 1, {"GOMP_SPINCOUNT": "5"}, {"GOMP_SPINCOUNT": "5"}),
        (0.0, None, {}, IDLE),  # off Linux there is the average only
        (100.0, None, {}, BUSY),
    ],
)
def test_threads_spin_briefly_where_the_machine_is_idle_and_sleep_where_it_is_busy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, average: float, running: int | None,
    set_by_user: dict[str, str], expected: dict[str, str],
) -> None:  # fmt: skip
    loads = tmp_path / "loadavg"
    if running is not None:
        loads.write_text(f"{average} {average} {average} {running}/188 20782\n")
    monkeypatch.setattr("nelbo.process.LOADAVG", loads)
    monkeypatch.setattr(os, "getloadavg", lambda: (average, average, average))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "environ", dict(set_by_user))
    choose_waiting()
    assert os.environ == expected


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only the mean load of a minute is known")
def test_a_process_that_has_just_started_to_compute_is_counted() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    try:
        assert busy.stdout is not None
        busy.stdout.readline()
        assert others() > 0.5
    finally:
        busy.kill()
        busy.communicate()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives freed memory back at once")
@pytest.mark.parametrize(("set_by_user", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)])
def test_memory_of_a_step_is_kept_for_the_next_where_the_user_has_not_chosen(
    set_by_user: dict[str, str], kept: bool
) -> None:
    program = """
import resource, torch
from nelbo.process import keep_memory
print(int(keep_memory()))
for steps in (20, 20):  # free blocks of the main heap find their places in the first ten steps
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        sum(torch.ones(2**24) for _ in range(2))  # 64 MB each
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | set_by_user
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    said, *_, faults = (int(line) for line in run.stdout.split())
    assert bool(said) == kept
    assert faults < 10000 if kept else faults > 20 * 10000  # a step that keeps nothing: three blocks, 49152 pages
