r"""What MuLAN's training step costs beside VDM's, and beside what its counted operations say.

The same steps as in training_step.py (``Trainer.take_step``, random images), of several presets in one process, in
turns. For each preset, against the first,

    (1)  time ratio       seconds of its step / seconds of the first one's, within the same turn: median (min..max)
    (2)  operation ratio  its operations / the first one's, counted from shapes in a real step (training_step.py)
    (3)  excess           (1)/(2): 1 where a step costs what its operations say

The schedule network has few operations for its weights, a product with a row an image: what it costs are passes over
its weights, gradients, moments and average. The presets with a smaller one say how much that is.

On a machine that does other work too, ``--clock process`` counts the processor's time instead, and the excess of the
shortest steps, which is printed beside, says more than the medians.

    python benchmarks/mulan_step.py --threads 2 --out mulan.json
    python benchmarks/mulan_step.py --threads 2 --levels 32 --repeats 5
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent))
from nelbo.process import choose_waiting, keep_memory

choose_waiting()  # before torch is loaded

import torch
import training_step as shared
import tyro

from nelbo.compose import parameters_by_part

WARM = 4  # turns that are not counted: until then the heap may grow
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "process": time.process_time}


@dataclass(frozen=True)
class Comparison:
    """What is measured. The defaults are the size at which the project states its efficiency."""

    presets: tuple[str, ...] = (
        "vdm-cifar10",
        "mulan-cifar10",
        "mulan-small-schedule-cifar10",
        "mulan-factored-schedule-cifar10",
        "mulan-small-encoder-cifar10",
    )
    """The presets whose steps are taken; the first is what the others are held against."""
    channels: int = 128
    """Channels of the network."""
    levels: int = 8
    """Residual blocks on the way down."""
    batch: int = 8
    """Images in a step."""
    size: int = 32
    """Height and width of the images."""
    image_channels: int = 3
    """Channels of the images."""
    precision: tuple[shared.Precision, ...] = ("float32", "bf16")
    """Precisions of the network, one after the other."""
    threads: int | None = None
    """Threads. By default torch's choice."""
    repeats: int = 9
    """Turns, after a warm-up."""
    clock: Literal["wall", "process"] = "wall"
    """Seconds that pass, or seconds that this process computes (for a machine that does other work too)."""
    out: Path | None = None
    """A JSON file for all figures."""


def measure(case: Comparison, precision: shared.Precision) -> dict[str, Any]:
    """Steps of all presets in turns, by preset."""
    clock, trainers, results = CLOCKS[case.clock], {}, {}
    for name in case.presets:
        one = shared.Case(
            preset=name, channels=case.channels, levels=case.levels, batch=case.batch, size=case.size,
            image_channels=case.image_channels,
        )  # fmt: skip
        trainer = trainers[name] = shared.make_trainer(one, precision)
        flops = shared.record(trainer).flops()
        results[name] = {"parameters": parameters_by_part(trainer.model), "flops_per_step": flops}
    samples: dict[str, list[float]] = {name: [] for name in case.presets}
    for turn in range(WARM + case.repeats):
        for name, trainer in trainers.items():
            shared.wait()
            begun = clock()
            trainer.take_step()
            shared.wait()
            if turn >= WARM:
                samples[name].append(clock() - begun)
    first = case.presets[0]
    for name, result in results.items():
        operations = result["flops_per_step"]["total"] / results[first]["flops_per_step"]["total"]
        ratios = [a / b for a, b in zip(samples[name], samples[first], strict=True)]
        result |= {
            "samples": samples[name],
            "seconds_per_step": shared.spread(samples[name]),
            "time_ratio": shared.spread(ratios),
            "operation_ratio": operations,
            "excess": shared.spread([ratio / operations for ratio in ratios]),
            "excess_of_shortest": min(samples[name]) / min(samples[first]) / operations,
        }
    return results


def show(results: dict[str, Any]) -> str:
    """The table of ``measure``."""
    rows = []
    for name, r in results.items():
        parts = " + ".join(f"{r['parameters'].get(part, 0) / 1e6:.2f}" for part in ("network", "schedule", "encoder"))
        rows.append([
            name, parts, f"{r['flops_per_step']['total'] / 1e9:.4g}", shared.show(r["seconds_per_step"], 1e3),
            shared.show(r["time_ratio"], digits=2), f"{r['operation_ratio']:.3f}", shared.show(r["excess"], digits=3),
            f"{r['excess_of_shortest']:.3f}",
        ])  # fmt: skip
    header = ["step", "M parameters: network + schedule + encoder", "GFLOP", "ms", "time ratio", "operation ratio",
              "excess", "excess of the shortest"]  # fmt: skip
    return shared.table(header, rows)


def main(case: Comparison) -> dict[str, Any]:
    """Measure, print, and write what was asked for."""
    keep_memory()  # as the nelbo command does
    if case.threads:
        torch.set_num_threads(case.threads)
    report: dict[str, Any] = {
        "case": asdict(case) | {"out": None}, "machine": shared.machine(), "formula": shared.FORMULA,
    }  # fmt: skip
    info = report["machine"]
    print(
        f"{case.channels} channels, {case.levels} levels, batch {case.batch} of {case.image_channels}x{case.size}x"
        f"{case.size}; torch {info['torch']}, {info['device']}: {info['cpu']} ({' '.join(info['flags'])}), "
        f"{info['threads']} threads on {info['cores']} cores, {case.clock} clock\noperations: {shared.FORMULA}"
    )
    report["results"] = {}
    for precision in case.precision:
        report["results"][precision] = measure(case, precision)
        print(f"\n{precision}\n\n{show(report['results'][precision])}", flush=True)
    info["load_after"] = shared.machine()["load"]
    print(f"\nload {info['load'][0]} before, {info['load_after'][0]} after")
    if case.out is not None:
        case.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main(tyro.cli(Comparison, description=__doc__))
