r"""How many images a second the loader delivers, beside what the fastest training step consumes.

For each set, with each augmentation that fits it: batches in order from a position in the middle of an epoch, for
seconds on end; by one process, and by two at once of which each takes its half of every batch, as in training. Sets are
digits (in memory) and prepared ones made here (random values, mapped into memory): 60 000 images of 1x28x28, 50 000 of
3x32x32, and 1 281 149 of 3x32x32, whose order is not held in memory. A step of vdm-digits, the fastest preset, is timed
in the same run, on as many threads as given; the figure is images delivered for each that it consumes.

    python benchmarks/loader.py --threads 2 --out loader.json
"""

import json
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import training_step as shared  # chooses how threads wait, before torch is loaded
import tyro

from nelbo.data import Batches, load
from nelbo.data.loader import AUGMENTATIONS
from nelbo.data.prepared import mapped
from nelbo.presets import preset
from nelbo.process import keep_memory


@dataclass(frozen=True)
class Case:
    """What is timed."""

    batch: int = 128
    """Images in a batch."""
    seconds: float = 2.0
    """Of every measurement."""
    threads: int | None = None
    """CPU threads of the training step."""
    out: Path | None = None
    """JSON file."""


SETS = {
    "digits": None,
    "1x28x28": (60_000, 1, 28, 28),
    "3x32x32": (50_000, 3, 32, 32),
    "ImageNet-32": (1_281_149, 3, 32, 32),
}


def images_of(name: str, folder: Path) -> np.ndarray:
    """A set's training images; a large file's blocks are written where they are first asked for."""
    shape = SETS[name]
    if shape is None:
        return load("digits").images["train"]
    path = folder / f"{name}.npy"
    if not path.exists():
        array = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        array[:50_000] = np.random.default_rng(0).integers(0, 256, (min(50_000, len(array)), *shape[1:]), np.uint8)
        array.flush()
    return mapped(path)


def deliver(name: str, folder: Path, augment: str, case: Case, process: int, processes: int) -> float:
    """Images a second that one process takes."""
    batches = Batches(images_of(name, folder), None, case.batch, 0, augment)
    size = case.batch // processes
    part = slice(process * size, (process + 1) * size)
    first = len(batches.images) // case.batch // 2
    batches.batch_at(first, part)
    begun, step = time.perf_counter(), first
    while time.perf_counter() - begun < case.seconds:
        step += 1
        batches.batch_at(step, part)
    return size * (step - first) / (time.perf_counter() - begun)


def consumed(case: Case) -> float:
    """Images a second of vdm-digits' training step: the best of some."""
    import torch

    from nelbo.training import Trainer

    keep_memory()
    if case.threads:
        torch.set_num_threads(case.threads)
    config = preset("vdm-digits")
    trainer = Trainer(config, Path("unused"), load("digits"))
    times = []
    for _ in range(20):
        begun = time.perf_counter()
        trainer.take_step()
        times.append(time.perf_counter() - begun)
    return config.training.batch / min(times[5:])


def main(case: Case) -> dict[str, Any]:
    """Measure, and print a table."""
    load_before = os.getloadavg()[0]
    rate, rows, results = consumed(case), [], {}
    with tempfile.TemporaryDirectory() as scratch, multiprocessing.get_context("spawn").Pool(2) as pool:
        for name in SETS:
            images_of(name, Path(scratch))
            for augment in AUGMENTATIONS:
                row = [name, augment]
                for processes in (1, 2):
                    jobs = [(name, Path(scratch), augment, case, i, processes) for i in range(processes)]
                    total = sum(pool.starmap(deliver, jobs))
                    results[f"{name}, {augment}, {processes}"] = total
                    row += [f"{total:,.0f}", f"{total / rate:.0f}"]
                rows.append(row)
    print(f"vdm-digits consumes {rate:,.0f} images/s at best; batches of {case.batch}")
    print(shared.table(["set", "augmentation", "images/s", "times that", "two processes", "times that"], rows))
    print(f"load {load_before:.1f} before, {os.getloadavg()[0]:.1f} after")
    report = {"case": {**asdict(case), "out": None}, "machine": shared.machine()}
    report |= {"consumed": rate, "delivered": results}
    if case.out is not None:
        case.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main(tyro.cli(Case, description=__doc__))
