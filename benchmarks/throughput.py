"""Images a second of evaluation and sampling by batch, what nelbo chooses by itself, and what bf16 does to samples.

    python benchmarks/throughput.py RUN                          RUN: a trained run
    python benchmarks/throughput.py RUN --write docs/performance.md

The bound is taken at one time an image, the likelihood by ODE with a tolerance of 0.9 (a handful of evaluations of the
network and its divergence), samples in 4 ancestral steps: what grows with the number of steps is the time, not the best
batch. Each figure is the median, with min..max, of interleaved repeats. Memory is what Live of nelbo.memory counts at
the peak; beside it the free memory of which nelbo takes half.

For bf16 the same noise is drawn to samples in both precisions, in ``--steps`` ancestral steps. "differ" is the share of
pixels whose grey level is another one, "mean" the mean absolute difference in grey levels; and, for what a difference
of so many levels means, the same between samples of ``--steps`` and of half as many steps in float32.
"""

import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nelbo.process import choose_waiting, keep_memory

choose_waiting()  # as the nelbo command does; read once, when torch is loaded

import numpy as np
import torch
import tyro

from nelbo import checkpoints, likelihood, sampling
from nelbo.data import load
from nelbo.memory import Live, free_memory
from nelbo.model import DiffusionModel

MARK = "throughput"


@dataclass(frozen=True)
class Case:
    """What is measured."""

    run: tyro.conf.Positional[Path]
    """A trained run."""
    batches: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)
    """Rows at once."""
    repeats: int = 3
    """Interleaved repeats; the median counts."""
    seconds: float = 20.0
    """Batches whose first repeat takes longer are left out from there on."""
    samples: int = 64
    """Samples of each precision."""
    steps: int = 256
    """Ancestral steps of those."""
    threads: int | None = None
    """Threads. By default torch's choice."""
    write: Path | None = None
    """A file between whose marks the tables are put."""


def works(case: Case, model: DiffusionModel) -> dict[str, Callable[[int], Any]]:
    """What is done with so many rows at once."""
    record = checkpoints.read_run(case.run)
    data = load(record["config"]["data"]["source"])
    images = np.concatenate([data.images["test"], data.images["train"]])
    labels = None if data.labels is None else np.concatenate([data.labels["test"], data.labels["train"]])

    def first(n: int) -> dict[str, Any]:
        rows = np.arange(n) % len(images)
        return {"images": images[rows], "labels": None if labels is None else labels[rows], "batch": n}

    def bound(n: int) -> None:
        likelihood.vlb(model, times_per_shift=1, shifts=1, **first(n))

    def ode(n: int) -> None:
        likelihood.ode(model, replicates=1, rtol=0.9, atol=0.9, method="bosh3", least_steps=1, **first(n))

    def samples(n: int) -> None:
        sampling.draw(model, sampling.Settings(n, steps=4, batch=n), range(n))

    return {"bound": bound, "ODE": ode, "samples": samples}


def by_batch(case: Case, model: DiffusionModel) -> list[str]:
    """Images a second and MiB at the peak, by batch."""
    done, lines = works(case, model), ["| batch |", "|---|"]
    for name in done:
        lines[0] += f" {name}, images/s | MiB |"
        lines[1] += "---|---|"
    kept = {name: list(case.batches) for name in done}
    seconds: dict[tuple[str, int], list[float]] = {}
    for turn in range(case.repeats + 1):  # the first warms up
        for name, work in done.items():
            for batch in list(kept[name]):
                begun = time.perf_counter()
                work(batch)
                took = time.perf_counter() - begun
                if turn:
                    seconds.setdefault((name, batch), []).append(took)
                elif took > case.seconds:
                    kept[name] = [b for b in kept[name] if b < batch]
                    break
    for batch in case.batches:
        line = f"| {batch} |"
        for name, work in done.items():
            if batch not in kept[name]:
                line += " | |"
                continue
            rates = sorted(batch / s for s in seconds[name, batch])
            with Live() as live:
                work(batch)
            line += f" {statistics.median(rates):.3g} ({rates[0]:.3g}..{rates[-1]:.3g}) | {live.most / 2**20:.1f} |"
        lines.append(line)
    chosen = sampling.resolved(sampling.Settings(), model, "the model").batch
    lines += ["", f"nelbo's own choice for samples here, with {free_memory('cpu') / 2**30:.1f} GiB free: {chosen}."]
    return lines


def by_precision(case: Case, model: DiffusionModel) -> list[str]:
    """Samples of the same noise in two precisions, and in half as many steps."""
    ways = {
        "float32": sampling.Settings(case.samples, steps=case.steps),
        "bf16": sampling.Settings(case.samples, steps=case.steps, precision="bf16"),
        "float32, half the steps": sampling.Settings(case.samples, steps=case.steps // 2),
    }
    drawn, seconds = {}, {}
    for name, settings in ways.items():
        begun = time.perf_counter()
        drawn[name] = sampling.draw_all(model, sampling.resolved(settings, model, "it")).astype(int)
        seconds[name] = time.perf_counter() - begun
    lines = [f"| {case.samples} samples, {case.steps} steps | seconds | differ, % | mean, levels of {model.levels} |"]
    lines.append("|---|---|---|---|")
    for name, images in drawn.items():
        difference = np.abs(images - drawn["float32"])
        share, mean = 100 * (difference > 0).mean(), difference.mean()
        lines.append(f"| {name} | {seconds[name]:.1f} | {share:.2f} | {mean:.4f} |")
    return lines


def main() -> None:
    case = tyro.cli(Case, description=__doc__)
    keep_memory()
    if case.threads:
        torch.set_num_threads(case.threads)
    before = os.getloadavg()[0]
    model = checkpoints.load_model(case.run)
    lines = [*by_batch(case, model), "", *by_precision(case, model)]
    lines += ["", f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} "
              f"threads, load {before:.1f} before and {os.getloadavg()[0]:.1f} after."]  # fmt: skip
    text = "\n".join(lines)
    print(text)
    if case.write is not None:
        old = case.write.read_text()
        new, count = re.subn(rf"(<!-- {MARK} -->\n).*?(<!-- end {MARK} -->)", lambda m: f"{m[1]}{text}\n{m[2]}", old,
                             flags=re.S)  # fmt: skip
        if count != 1:
            sys.exit(
                f"{case.write} must hold <!-- {MARK} --> and <!-- end {MARK} --> once, and holds them {count} times"
            )
        case.write.write_text(new)


if __name__ == "__main__":
    main()
