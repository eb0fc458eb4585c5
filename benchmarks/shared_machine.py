r"""Training steps of a small model on a machine that others use too, by how OpenMP's threads wait for each other.

A step of ``mulan-digits`` hands work to the threads many hundred times, and each time the first that is done waits for
the last: spinning, which keeps a core from whoever else wants it, or asleep, which costs a system call and a wake-up.
Each cell of the table is a fresh process that trains for some seconds after a first step,

- alone;
- beside processes that keep a core busy each, and did before it started;
- for nelbo's own choice (``nelbo.process.choose_waiting``) also beside such as start after its first step. What is set
  by hand knows nothing of who started first, and has no such cell.

Repeats are interleaved: every cell once, then again. A cell is the median (min..max) of images a second.

    (1)  kept  images/s beside others / images/s alone, from medians: the part of the speed that is left

    python benchmarks/shared_machine.py --threads 2 --out threads.json --write docs/performance.md
    python benchmarks/shared_machine.py --from threads.json
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

HERE = Path(__file__).resolve().parent
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


class Way(NamedTuple):
    """How the threads of a process wait."""

    environment: dict[str, str]
    one_thread: bool = False
    chooses: bool = False


WAYS = {
    "GNU OpenMP's default (long spins)": Way({}),
    "GOMP_SPINCOUNT=10000": Way({"GOMP_SPINCOUNT": "10000"}),
    "GOMP_SPINCOUNT=3000": Way({"GOMP_SPINCOUNT": "3000"}),
    "GOMP_SPINCOUNT=1000": Way({"GOMP_SPINCOUNT": "1000"}),
    "OMP_WAIT_POLICY=PASSIVE (no spins)": Way({"OMP_WAIT_POLICY": "PASSIVE"}),
    "one thread": Way({}, one_thread=True),
    "nelbo's choice": Way({}, chooses=True),
}


class Others(NamedTuple):
    """Processes that keep a core busy: those that are there before, and those that start after the first step."""

    before: int
    later: int

    def __str__(self) -> str:
        return f"{self.later} start{'s' * (self.later == 1)} later" if self.later else (
            f"beside {self.before}" if self.before else "alone"
        )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is measured."""

    preset: str = "mulan-digits"
    """The preset whose steps are taken."""
    ways: tuple[str, ...] = tuple(WAYS)
    """How threads wait."""
    beside: tuple[int, ...] = (1, 2)
    """Numbers of other processes."""
    threads: int = os.cpu_count() or 1
    """Threads: as many as there are cores."""
    seconds: float = 2.0
    """Of each cell, after its first step; one step at least."""
    repeats: int = 3
    """Times that every cell is measured."""
    out: Path | None = None
    """A JSON file for all figures."""
    write: Path | None = None
    """A page whose text between <!-- threads --> and <!-- end threads --> becomes the table."""
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """A JSON file of --out: show it again, and measure nothing."""


# In a process of its own ----------------------------------------------------------------------------------------------


def work(text: str) -> None:
    """Take steps: say when the first is done, wait for a line, and say how fast the others were."""
    task = json.loads(text)
    from nelbo.process import choose_waiting, keep_memory

    if task["chooses"]:
        choose_waiting()
    import torch

    from nelbo.data import load
    from nelbo.presets import preset
    from nelbo.training import Trainer

    keep_memory()  # as the nelbo command does
    torch.set_num_threads(task["threads"])
    trainer = Trainer(preset(task["preset"]), Path("unused"), load("digits"))
    trainer.take_step()
    print("ready", flush=True)
    sys.stdin.readline()
    steps, begun, cpu = 0, time.perf_counter(), time.process_time()
    while not steps or time.perf_counter() - begun < task["seconds"]:
        trainer.take_step()
        steps += 1
    seconds, computed = time.perf_counter() - begun, time.process_time() - cpu
    found = {
        "images_per_second": steps * trainer.config.training.batch / seconds,
        "steps": steps,
        "cpu_seconds_per_step": computed / steps,
        "waiting": {name: os.environ[name] for name in WAITING if name in os.environ},
    }
    print(json.dumps(found), flush=True)


def compute(parent: int) -> None:
    """Keep a core busy for as long as the process that asked for it lives."""
    print("ready", flush=True)
    while os.getppid() == parent:
        for _ in range(100_000):
            pass


@contextlib.contextmanager
def started(function: str, argument: Any, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A function of this file in a fresh process, which is gone in the end."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import shared_machine as m; m.{function}({argument!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def hear(process: subprocess.Popen[str]) -> str:
    """Its next line."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a process of this benchmark ended with status {process.wait()}; its own lines say why")
    return line


def measure(way: Way, others: Others, case: Case) -> dict[str, Any]:
    """One cell, once."""
    unset = {*WAITING, "OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "LOCAL_RANK"}
    environment = {k: v for k, v in os.environ.items() if k not in unset} | {"CUDA_VISIBLE_DEVICES": ""}
    threads = 1 if way.one_thread else case.threads
    task = {"preset": case.preset, "threads": threads, "seconds": case.seconds, "chooses": way.chooses}
    with contextlib.ExitStack() as stack:

        def keep_busy(count: int) -> None:
            for _ in range(count):
                hear(stack.enter_context(started("compute", os.getpid(), environment)))

        keep_busy(others.before)
        trains = stack.enter_context(started("work", json.dumps(task), environment | way.environment))
        hear(trains)
        keep_busy(others.later)
        assert trains.stdin is not None
        trains.stdin.write("go\n")
        trains.stdin.flush()
        return dict(json.loads(hear(trains)))


def cells(case: Case) -> list[tuple[str, Others]]:
    """All of the table's."""
    found = []
    for name in case.ways:
        columns = [Others(0, 0), *(Others(n, 0) for n in case.beside)]
        columns += [Others(0, n) for n in case.beside] if WAYS[name].chooses else []
        found += [(name, others) for others in columns]
    return found


# Report ---------------------------------------------------------------------------------------------------------------


def show(report: dict[str, Any]) -> str:
    """The tables, and what they say."""
    from training_step import show as shown
    from training_step import spread, table

    by_cell: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for record in report["records"]:
        by_cell.setdefault(record["way"], {}).setdefault(record["others"], []).append(record)
    columns = list(dict.fromkeys(record["others"] for record in report["records"]))  # alone, beside, later
    rates = {
        (way, column): spread([r["images_per_second"] for r in records])
        for way, found in by_cell.items()
        for column, records in found.items()
    }
    digits = {key: 0 if value["median"] >= 10 else 1 for key, value in rates.items()}
    rows = [
        [way, *(shown(rates[way, c], digits=digits[way, c]) if (way, c) in rates else "" for c in columns)]
        for way in by_cell
    ]
    parts = [table(["images/s", *columns], rows)]
    kept = [
        [way, *(f"{100 * rates[way, c]['median'] / rates[way, 'alone']['median']:.0f}" if (way, c) in rates else ""
                for c in columns[1:])]
        for way in by_cell
    ]  # fmt: skip
    parts.append("Of the speed alone each keeps, in %:\n\n" + table(["kept, %", *columns[1:]], kept))
    own = [way for way in by_cell if WAYS[way].chooses]
    if own:
        lines = []
        for column in columns:
            chosen = Counter(_setting(r["waiting"]) for r in by_cell[own[0]][column])
            early = f"beside {column.split()[0]}" if "later" in column else column
            fastest = max(by_cell, key=lambda way: rates[way, early]["median"])
            lines.append([
                column, ", ".join(f"{name} ({n} of {chosen.total()})" for name, n in chosen.most_common()),
                fastest, f"{100 * rates[own[0], column]['median'] / rates[fastest, early]['median']:.0f}",
            ])  # fmt: skip
        parts.append(
            "What nelbo chose, and its speed beside the fastest row's (where others start later: beside as many that "
            "were there before):\n\n" + table(["", "chosen", "fastest", "nelbo / fastest, %"], lines)
        )
    info, case = report["machine"], report["case"]
    peaks = " and ".join(f"{shown(p['gflops'])} ({p['product']})" for p in report["gemm"])
    parts.append(
        f"`{case['preset']}`, {case['threads']} threads on {info['cores']} cores of an {info['cpu']} "
        f"({' '.join(info['flags'])}), torch {info['torch']}, {case['seconds']:g} s a cell, {case['repeats']} "
        f"interleaved repeats; float32 GEMM peak before and after, GFLOP/s: {peaks}; load {info['load'][0]} before, "
        f"{info['load_after'][0]} after (the run itself and its competitors)."
    )
    return "\n\n".join(parts)


def _setting(waiting: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in waiting.items()) or "nothing"


def main(case: Case) -> dict[str, Any]:
    """Measure, print, and write what was asked for."""
    unknown: Sequence[str] = [way for way in case.ways if way not in WAYS]
    if unknown:
        raise SystemExit(f"--ways must be among {', '.join(WAYS)}, got {', '.join(unknown)}")
    sys.path.insert(0, str(HERE))
    import training_step as shared  # which loads torch: not in the processes that are measured

    if case.source:
        report = json.loads(case.source.read_text())
    else:
        report = {
            "case": asdict(case) | {"out": None, "write": None, "source": None},
            "machine": shared.machine(), "gemm": [shared.gemm_peak("float32")], "records": [],
        }  # fmt: skip
        begun = time.monotonic()
        for turn in range(case.repeats):
            for name, others in cells(case):
                found = measure(WAYS[name], others, case)
                report["records"].append({"way": name, "others": str(others), "turn": turn, **found})
                print(f"{time.monotonic() - begun:.0f} s: {name}, {others}: {found['images_per_second']:.4g} images/s",
                      file=sys.stderr)  # fmt: skip
        report["gemm"].append(shared.gemm_peak("float32"))
        report["machine"]["load_after"] = shared.machine()["load"]
        if case.out:
            case.out.write_text(json.dumps(report, indent=1) + "\n")
    text = show(report)
    print(text)
    if case.write:
        shared.write_between(case.write, "threads", text)
    return report


if __name__ == "__main__":
    main(tyro.cli(Case, description=__doc__))
