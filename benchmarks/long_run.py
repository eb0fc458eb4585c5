r"""Whether a long training grows or slows down: thousands of steps of a tiny model with all else that a run does.

``nelbo.training.train`` itself trains a preset made small, with its log, evaluations on validation images,
checkpoints (and the removal of old ones) at the preset's own distance in steps, a grid of samples, and the progress
that the command shows. Every ``window`` steps are written down

- the seconds and the CPU seconds that the window took, all of the above included,
- the resident set, and the bytes that the C library has handed out and not got back (``mallinfo2``),
- open file descriptors, threads, objects that Python's collector knows, and tensors among them.

After the warm-up (the first tenth) each of them is fitted by a line. Neighbouring windows are alike, so the line goes
through the means of ten blocks of windows, and its error is that of the blocks around it:

    (1)  slope = sum_b (s_b - s) (y_b - y) / sum_b (s_b - s)^2      (2)  error^2 = sum_b r_b^2 / (8 sum_b (s_b - s)^2)

where s_b, y_b are a block's mean step and mean value, and r_b what the line leaves. The time of the last tenth of the
run is held against that of the second tenth.

With ``--log-lines`` it asks instead what a log of so many lines costs: a run of a few steps gets a metrics.jsonl made
of its own lines, with an evaluation after as many as at the papers' settings; timed are opening it, as a continuation
does, and ``nelbo report``, with the growth of the resident set at its peak.

    python benchmarks/long_run.py --threads 1 --out long.json
    python benchmarks/long_run.py --threads 1 --log-lines 200000 1000000
"""

import gc
import json
import math
import os
import platform
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nelbo.process import choose_waiting, keep_memory

choose_waiting()  # as the nelbo command does; read once, when torch is loaded

import numpy as np
import torch
import tyro

from nelbo.config import Config, TrainingConfig
from nelbo.logs import Log
from nelbo.presets import preset
from nelbo.progress import Progress
from nelbo.report import write_report
from nelbo.training import train

BLOCKS = 10


@dataclass(frozen=True)
class Case:
    """What is trained, and where it is written down."""

    preset: str = "mulan-digits"
    """What is made small."""
    steps: int = 20_000
    """Optimizer steps."""
    batch: int = 8
    """Images in a step."""
    channels: int = 8
    """Channels of the network and of the encoder, which have one level each."""
    window: int = 100
    """Steps between two readings."""
    sample_every: int = 2000
    """Steps between grids of samples."""
    threads: int | None = None
    """CPU threads. By default what PyTorch takes."""
    log_lines: tuple[int, ...] = ()
    """Instead: lines of training in a log that is opened and reported."""
    run: Path | None = None
    """Folder of the run, which is kept. By default one for the time being."""
    out: Path | None = None
    """JSON file of all readings."""


def configuration(case: Case) -> Config:
    """The preset made small. What it does every so many images it does after as many steps as the preset."""
    base = preset(case.preset)
    scale = case.batch / base.training.batch
    training = replace(
        base.training,
        steps=case.steps,
        batch=case.batch,
        evaluate_every=round(base.training.evaluate_every * scale),
        save_every=round(base.training.save_every * scale),
        sample_every=case.sample_every * case.batch,
    )
    return replace(
        base,
        schedule=replace(base.schedule, width=16),
        encoder=replace(base.encoder, levels=1),
        network=replace(base.network, channels=case.channels, levels=1, groups=2),
        training=training,
    )


def allocated() -> Callable[[], int]:
    """A function that returns the bytes which glibc has handed out: small blocks and mapped ones."""
    import ctypes

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    kind = type("mallinfo2", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names.split()]})
    call = ctypes.CDLL(None).mallinfo2
    call.restype = kind

    def read() -> int:
        found = call()
        return int(found.uordblks + found.hblkhd)

    return read


class Readings:
    """Every quantity over the run, by name; ``step`` is where it was read. They take no memory as they come."""

    names = ("step", "seconds", "cpu_seconds", "resident", "allocated", "descriptors", "threads", "objects", "tensors")
    names += ("load",)

    def __init__(self, most: int) -> None:
        self.values, self.count = np.zeros((most, len(self.names))), 0

    def add(self, **values: float) -> None:
        """One reading of each."""
        self.values[self.count] = [values[name] for name in self.names]
        self.count += 1

    def column(self, name: str) -> np.ndarray:
        """(readings,)"""
        return self.values[: self.count, self.names.index(name)]


def watch(case: Case, readings: Readings) -> Callable[[int, float, float], None]:
    """A ``show`` of ``train`` that reads the process every ``window`` steps; its own time is not counted."""
    heap, page = allocated(), os.sysconf("SC_PAGE_SIZE")
    wall, cpu = time.perf_counter(), time.process_time()

    def show(step: int, bits: float, rate: float) -> None:
        nonlocal wall, cpu
        if step % case.window:
            return
        if step:
            seconds, work = time.perf_counter() - wall, time.process_time() - cpu
            known = gc.get_objects()
            readings.add(
                step=step,
                seconds=seconds,
                cpu_seconds=work,
                resident=int(Path("/proc/self/statm").read_text().split()[1]) * page,
                allocated=heap(),
                descriptors=len(os.listdir("/proc/self/fd")),
                threads=len(os.listdir("/proc/self/task")),
                objects=len(known),
                tensors=sum(issubclass(type(o), torch.Tensor) for o in known),
                load=os.getloadavg()[0],
            )
            del known
        wall, cpu = time.perf_counter(), time.process_time()

    return show


def slope(step: np.ndarray, value: np.ndarray) -> tuple[float, float]:
    """Equations (1) and (2): growth a step, and its standard error."""
    s, y = (np.array([block.mean() for block in np.array_split(column, BLOCKS)]) for column in (step, value))
    spread = ((s - s.mean()) ** 2).sum()
    found = ((s - s.mean()) * (y - y.mean())).sum() / spread
    rest = y - y.mean() - found * (s - s.mean())
    return float(found), float(np.sqrt((rest**2).sum() / (BLOCKS - 2) / spread))


SHOWN = {  # reading -> what it is called, its unit's size, the unit
    "resident": ("resident set", 1024, "KiB"),
    "allocated": ("handed out by the C library", 1024, "KiB"),
    "descriptors": ("open descriptors", 1, ""),
    "threads": ("threads", 1, ""),
    "objects": ("objects of Python", 1, ""),
    "tensors": ("tensors", 1, ""),
    "seconds": ("seconds a window", 1, "s"),
    "cpu_seconds": ("CPU seconds a window", 1, "s"),
}


def report(readings: Readings) -> str:
    """The fits as a table, and the time of the last tenth against the second."""
    step = readings.column("step")
    warm = len(step) // 10
    rows = [
        "| | after warm-up | at the end | growth in 1000 steps |",
        "|---|---|---|---|",
    ]
    for name, (title, size, unit) in SHOWN.items():
        value = readings.column(name)[warm:] / size
        growth, error = (1000 * x for x in slope(step[warm:], value))
        head = f"{title}, {unit}" if unit else title
        count, digits = len(value) // 10, 3 if unit == "s" else 0
        first, last = value[:count].mean(), value[-count:].mean()
        rows.append(f"| {head} | {first:,.{digits}f} | {last:,.{digits}f} | {growth:+.3g} ± {error:.2g} |")
    lines = ["\n".join(rows), ""]
    for name in ("seconds", "cpu_seconds"):
        tenths = np.array_split(readings.column(name), 10)
        ratio = tenths[9].mean() / tenths[1].mean()
        spread = ratio * np.hypot(*(t.std(ddof=1) / np.sqrt(len(t)) / t.mean() for t in (tenths[9], tenths[1])))
        lines.append(f"{SHOWN[name][0]}, last tenth / second tenth: {ratio:.3f} ± {spread:.3f}")
    return "\n".join(lines)


def peak() -> int:
    """The largest resident set since the last call, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    Path("/proc/self/clear_refs").write_text("5")  # begin anew
    return int(found[1]) * 1024


def logs(case: Case) -> str:
    """What opening and reporting logs of many lines costs, as a table."""
    rows = ["| lines | steps, thousands | log, MiB | opening, ms | and MiB | report, CPU s | and MiB | page, KB |"]
    rows.append("|" + "---|" * 8)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        base = configuration(replace(case, steps=50))
        config = replace(base, training=replace(base.training, evaluate_every=50 * case.batch, sample_every=0))
        train(config, run, preset=case.preset, say=lambda line: None)
        line, evaluation = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        every, paper = config.training.log_every, TrainingConfig()
        between = round(paper.evaluate_every / paper.batch / every)  # lines between evaluations
        write_report([run], Path(folder) / "short.html")  # loads what a report needs
        for lines in case.log_lines:
            with open(run / "metrics.jsonl", "w") as file:
                for i in range(1, lines + 1):
                    now = {"step": i * every, "images": i * every * paper.batch, "seconds": 0.1 * i * every}
                    bits = 2.5 + 5 / (1 + i / 100) + 0.1 * math.sin(12.9898 * i)
                    file.write(json.dumps(line | now | {"bits_per_dim": bits}) + "\n")
                    if i % between == 0:
                        file.write(json.dumps(evaluation | now) + "\n")
            size = (run / "metrics.jsonl").stat().st_size
            peak()
            before = peak()  # the resident set now
            begun = time.perf_counter()
            Log(run, (lines - between) * every).close()
            opening, opened = time.perf_counter() - begun, peak()
            begun = time.process_time()
            page = write_report([run], Path(folder) / "page.html").stat().st_size
            seconds, reported = time.process_time() - begun, peak()
            grown = [max(0, after - before) / 2**20 for after in (opened, reported)]
            cells = f"{lines:,}", f"{lines * every / 1000:,.0f}", f"{size / 2**20:.0f}", f"{1000 * opening:.0f}"
            cells += f"{grown[0]:.0f}", f"{seconds:.1f}", f"{grown[1]:.0f}", f"{page / 1000:.0f}"
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main(case: Case) -> None:
    """Train, and print what grew."""
    if case.log_lines:
        if case.threads:
            torch.set_num_threads(case.threads)
        print(logs(case))
        return
    if case.steps < 2 * BLOCKS * case.window:
        sys.exit(f"steps must be at least {2 * BLOCKS * case.window}, {2 * BLOCKS} windows, got {case.steps}")
    keep_memory()
    if case.threads:
        torch.set_num_threads(case.threads)
    readings, begun = Readings(case.steps // case.window), time.perf_counter()
    config = configuration(case)
    look = watch(case, readings)
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:

        def show(step: int, bits: float, rate: float) -> None:
            progress.update("training", step, case.steps, "" if bits != bits else f"{bits:.3f} bits/dim", rate)
            look(step, bits, rate)

        run = train(config, case.run or Path(folder) / "run", preset=case.preset, say=lambda line: None, show=show)
        sizes: Counter[str] = Counter()  # bytes by the first part of the path in the run
        for path in run.rglob("*"):
            if path.is_file():
                sizes[path.relative_to(run).parts[0]] += path.stat().st_size
    print(report(readings))
    print(f"{gc.collect():,} of the objects at the end were waiting for Python's collector")
    print(", ".join(f"{name} {size / 1024:,.0f} KiB" for name, size in sorted(sizes.items())))
    minutes, load = (time.perf_counter() - begun) / 60, readings.column("load")
    print(f"{minutes:.1f} minutes, load {load.min():.1f} to {load.max():.1f}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")  # fmt: skip
    if case.out:
        found = {"case": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(case).items()}, "sizes": sizes}
        found["readings"] = {name: readings.column(name).tolist() for name in readings.names}
        case.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Case))
