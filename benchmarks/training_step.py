r"""How fast a training step is, beside what the machine can do at best.

Measured in one process, interleaved (step, convolutions, matrix products; again), each as median with min..max:

- **step**: ``Trainer.take_step`` of ``nelbo.training`` itself, on random uint8 images in memory: batch, noise, forward,
  backward, clipping, AdamW, moving average. Nothing is copied from the library to be timed here.
- **convolutions alone**: every convolution that a real step ran is recorded in it (shapes, strides, precision, which
  gradients were asked for) and run again by itself, forward and backward, each as often as it occurred. The figure
  that the step is held against is that of the 3x3 convolutions; that of all is given beside it, with 1x1 shortcuts
  where they are convolutions (on a CPU the flat U-Net's are matrix products).
- **GEMM**: the best of several square matrix products, by ``torch.mm`` and by a 1x1 convolution (the two go to
  different libraries), in the same precision.

Operations are counted from shapes, in a real step:

    (1)  convolution  2 B H' W' C_out (C_in/groups) K_h K_w    dense  2 rows in out    attention  2 * 2 B N^2 E
    (2)  step = 3 * forward: the backward pass is two products of the size of the forward pass's one. A convolution
         whose input needs no gradient counts 2 * forward. What checkpointing computes again is not counted.

``--sweep`` varies levels, channels, pixels and batch one at a time, each with and without checkpointing, and reports
time and peak memory: the largest resident set (VmHWM) of a fresh process that takes the steps, less the resident set
just before its model was built. ``--profile`` adds the time by operator.

    python benchmarks/training_step.py --out step.json
    python benchmarks/training_step.py --sweep --out sweep.json
"""

import json
import math
import os
import platform
import statistics
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nelbo.process import choose_waiting, keep_memory

choose_waiting()  # as the nelbo command does; read once, when torch is loaded

import numpy as np
import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode

from nelbo.config import Config
from nelbo.data import Dataset
from nelbo.presets import preset
from nelbo.training import Trainer

FORMULA = (
    "convolution 2 B H W C_out C_in K K, dense 2 rows in out, attention 4 B N^2 E; step = 3 * forward "
    "(2 * forward where a convolution's input needs no gradient); recomputation not counted"
)
Precision = Literal["float32", "bf16"]
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
GEMM_SIZES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
aten = torch.ops.aten


@dataclass(frozen=True)
class Case:
    """What is measured. The defaults are the size at which the project states its efficiency."""

    preset: str = "vdm-cifar10"
    """The preset whose step is taken; the fields below override it."""
    channels: int = 128
    """Channels of the network. Groups are the preset's, or a quarter of the channels where those do not fit."""
    levels: int = 8
    """Residual blocks on the way down."""
    batch: int = 8
    """Images in a step."""
    size: int = 32
    """Height and width of the images."""
    image_channels: int = 3
    """Channels of the images."""
    grey_levels: int = 256
    """Values a pixel can take."""
    precision: tuple[Precision, ...] = ("float32", "bf16")
    """Precisions of the network, one after the other."""
    checkpointing: bool = False
    """Recompute activations in the backward pass (the sweep does both)."""
    compile: Literal["auto", "on", "off"] = "auto"
    """training.compile: auto compiles on a GPU."""
    threads: int | None = None
    """Threads. By default torch's choice."""
    repeats: int = 7
    """Interleaved repeats, after a warm-up."""
    sweep: bool = False
    """Vary levels, channels, pixels and batch, one at a time, instead."""
    profile: bool = False
    """Also print the time of a step by operator."""
    out: Path | None = None
    """A JSON file for all figures."""


# The step -------------------------------------------------------------------------------------------------------------


def configure(case: Case, precision: Precision) -> Config:
    """The preset's configuration at the case's size."""
    config = preset(case.preset)
    groups = config.network.groups
    if case.channels % groups or case.channels == groups:
        groups = max(case.channels // 4, 1)
    return replace(
        config,
        network=replace(
            config.network, channels=case.channels, levels=case.levels, groups=groups, checkpointing=case.checkpointing
        ),
        training=replace(config.training, batch=case.batch, precision=precision, compile=case.compile),
    )


def make_trainer(case: Case, precision: Precision) -> Trainer:
    """The library's trainer on random images. Weights that start at 0 get small numbers, as in a run under way."""
    draw = np.random.default_rng(0)
    images = draw.integers(
        0, case.grey_levels, (4 * case.batch, case.image_channels, case.size, case.size), dtype=np.uint8
    )
    labels = draw.integers(0, 10, len(images))
    data = Dataset(
        "random", "0", {"train": images, "validation": images[:1], "test": images[:1]},
        {"train": labels, "validation": labels[:1], "test": labels[:1]}, case.grey_levels, "random images",
    )  # fmt: skip
    trainer = Trainer(configure(case, precision), Path("unused"), data)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.01)
    return trainer


class Layout(NamedTuple):
    """How a tensor lies in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Convolution:
    """A convolution as a step ran it: its tensors, and which gradients were asked for."""

    gradient: Layout
    input: Layout
    weight: Layout
    dtype: torch.dtype
    bias: bool
    settings: tuple[Any, ...]  # stride, padding, dilation, transposed, output padding, groups
    mask: tuple[bool, ...]  # gradients asked for: input, weight, bias

    @property
    def forward_flops(self) -> int:
        """Equation (1)."""
        return 2 * math.prod(self.gradient.shape) * math.prod(self.weight.shape[1:])

    @property
    def flops(self) -> int:
        """Equation (2)."""
        return self.forward_flops * (1 + self.mask[0] + self.mask[1])

    @property
    def is_3x3(self) -> bool:
        """Whether the kernel is 3x3."""
        return self.weight.shape[2:] == (3, 3)

    def __str__(self) -> str:
        shape = self.weight.shape
        channels_last = self.input.stride[1] == 1 and self.input.shape[1] > 1
        return (
            f"{shape[2]}x{shape[3]} {shape[1]}->{shape[0]} {'channels last' if channels_last else 'contiguous'}"
            f"{'' if self.mask[0] else ', no input gradient'}"
        )

    def runner(self, device: Any) -> Callable[[], None]:
        """A function that runs it by itself, forward and backward."""
        gradient, x, weight = (
            torch.empty_strided(layout.shape, layout.stride, dtype=self.dtype, device=device).normal_()
            for layout in (self.gradient, self.input, self.weight)
        )
        bias = torch.zeros(len(weight), dtype=self.dtype, device=device) if self.bias else None
        sizes = [len(weight)] if self.bias else None

        def run() -> None:
            aten.convolution(x, weight, bias, *self.settings)
            aten.convolution_backward(gradient, x, weight, sizes, *self.settings, self.mask)

        return run


class Recorder(TorchDispatchMode):
    """Within it, a step's operations are counted by kind and its convolutions collected.

    It sees each operation as it reaches the kernels, after autocast: precision and memory format are the real ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward_flops: Counter[str] = Counter()
        self.convolutions: Counter[Convolution] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "convolution_backward":
            gradient, x, weight, sizes, *settings, mask = args
            found = Convolution(
                gradient=Layout(tuple(gradient.shape), gradient.stride()),
                input=Layout(tuple(x.shape), x.stride()),
                weight=Layout(tuple(weight.shape), weight.stride()),
                dtype=x.dtype,
                bias=sizes is not None,
                settings=tuple(tuple(v) if isinstance(v, list) else v for v in settings),
                mask=tuple(mask),
            )
            self.convolutions[found] += 1
        elif torch._C._current_graph_task_id() == -1:  # not in the backward pass, where recomputation also happens
            if name in ("mm", "bmm", "addmm", "baddbmm"):
                left, right = args[1:3] if "add" in name else args[:2]
                # One matrix for all images, repeated without memory of its own, is a dense layer or a 1x1 convolution.
                shared = "bmm" not in name or not left.stride(0) or not right.stride(0)
                self.forward_flops["dense" if shared else "attention"] += 2 * result.numel() * left.shape[-1]
            elif name.startswith("_scaled_dot_product"):
                query, key = args[:2]
                self.forward_flops["attention"] += 4 * query.numel() * key.shape[-2]
        return result

    def flops(self) -> dict[str, int]:
        """Operations of the step by kind, equation (2)."""
        convolutions = sum(count * c.flops for c, count in self.convolutions.items())
        counts = {"convolution": convolutions} | {kind: 3 * n for kind, n in sorted(self.forward_flops.items())}
        return counts | {"total": sum(counts.values())}


def record(trainer: Trainer) -> Recorder:
    """What a step runs. Compiled, it would run kernels that have no names: this step is not."""
    with torch.compiler.set_stance("force_eager"), Recorder() as recorder:
        trainer.take_step()
    return recorder


# Timing ---------------------------------------------------------------------------------------------------------------


def wait() -> None:
    """Until a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(run: Callable[[], object], times: int = 1) -> float:
    """Seconds that one run takes, the mean of several."""
    wait()
    begun = time.perf_counter()
    for _ in range(times):
        run()
    wait()
    return (time.perf_counter() - begun) / times


def spread(values: list[float]) -> dict[str, float]:
    """Median, min and max."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def gemms(dtype: torch.dtype, device: Any) -> dict[str, tuple[int, Callable[[], object]]]:
    """Matrix products: name -> (operations, function)."""
    runs: dict[str, tuple[int, Callable[[], object]]] = {}
    for n in GEMM_SIZES[torch.device(device).type]:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        image = a.T.reshape(1, n, n, 1).to(memory_format=torch.channels_last)
        kernel = b.reshape(n, n, 1, 1)
        runs[f"mm {n}"] = 2 * n**3, partial(torch.mm, a, b)
        runs[f"1x1 convolution {n}"] = 2 * n**3, partial(torch.conv2d, image, kernel)
    return runs


def gemm_peak(precision: Precision, repeats: int = 3) -> dict[str, Any]:
    """The best of the matrix products by itself, for benchmarks that measure something else: which, and GFLOP/s."""
    products = gemms(DTYPES[precision], "cuda" if torch.cuda.is_available() else "cpu")
    rates: dict[str, list[float]] = {name: [] for name in products}
    for turn in range(1 + repeats):
        for name, (n, run) in products.items():
            seconds = timed(run, 2)
            if turn:
                rates[name].append(n / seconds / 1e9)
    best = max(rates, key=lambda name: statistics.median(rates[name]))
    return {"product": best, "gflops": spread(rates[best])}


def measure(case: Case, precision: Precision) -> dict[str, Any]:
    """The step, its convolutions alone and the matrix products, interleaved."""
    trainer = make_trainer(case, precision)
    device = trainer.accelerator.device
    trainer.take_step()
    memory = None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        trainer.take_step()
        memory = torch.cuda.max_memory_allocated()
    recorder = record(trainer)
    flops = recorder.flops()
    alone = {c: c.runner(device) for c in recorder.convolutions}
    products = gemms(DTYPES[precision], device)
    often = {}  # short ones are repeated, so that each takes some 20 ms
    for key, run in [*alone.items(), *((name, run) for name, (_, run) in products.items())]:
        run()
        often[key] = max(1, math.ceil(0.02 / timed(run)))
    samples: dict[str, list[float]] = {}
    shapes: dict[Convolution, list[float]] = {c: [] for c in alone}
    best: Counter[str] = Counter()

    def add(name: str, value: float) -> None:
        samples.setdefault(name, []).append(value)

    for _ in range(case.repeats):
        seconds = timed(trainer.take_step, 1 if memory is None else 5)  # a GPU's in a row, as in training
        times = {c: timed(run, often[c]) for c, run in alone.items()}
        rates = {name: n / timed(run, often[name]) / 1e9 for name, (n, run) in products.items()}
        peak = max(rates, key=lambda name: rates[name])
        best[peak] += 1
        rate = flops["total"] / seconds / 1e9
        add("seconds_per_step", seconds)
        add("images_per_second", case.batch / seconds)
        add("gflops", rate)
        add("gemm_gflops", rates[peak])
        for name, chosen in (("convolutions_3x3", [c for c in alone if c.is_3x3]), ("convolutions", list(alone))):
            counts = recorder.convolutions
            taken = sum(counts[c] * times[c] for c in chosen)
            conv_rate = sum(counts[c] * c.flops for c in chosen) / taken / 1e9
            add(f"{name}_gflops", conv_rate)
            add(f"step_over_{name}", rate / conv_rate)
            add(f"{name}_share_of_time", taken / seconds)
        add("step_over_gemm", rate / rates[peak])
        for c, value in times.items():
            shapes[c].append(value)
    return {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "flops_per_step": flops,
        "gemm": best.most_common(1)[0][0],
        "peak_bytes": memory,
        **{name: spread(values) for name, values in samples.items()},
        "convolutions": [
            {
                "kernel": str(c), "input": list(c.input.shape), "count": recorder.convolutions[c], "flops": c.flops,
                "seconds": spread(values), "gflops": c.flops / statistics.median(values) / 1e9,
            }
            for c, values in shapes.items()
        ],
    }  # fmt: skip


def profile(case: Case, precision: Precision, steps: int = 3, rows: int = 20) -> list[dict[str, Any]]:
    """Self time by operator (on a GPU: of kernels there), ms a step, the largest first."""
    trainer = make_trainer(case, precision)
    for _ in range(2):
        trainer.take_step()
    activity = torch.profiler.ProfilerActivity
    on_gpu = trainer.accelerator.device.type == "cuda"
    with torch.profiler.profile(activities=[activity.CPU, *[activity.CUDA] * on_gpu]) as profiled:
        for _ in range(steps):
            trainer.take_step()
    averages = profiled.key_averages()

    def own(event: Any) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    total = sum(map(own, averages))
    largest = sorted(averages, key=lambda e: -own(e))[:rows]
    return [
        {
            "operator": e.key,
            "calls": e.count / steps,
            "ms": own(e) / steps / 1e3,
            "share": own(e) / total,
        }
        for e in largest
    ]


# Growth ---------------------------------------------------------------------------------------------------------------


def resident(largest: bool = False) -> int:
    """Bytes of this process in memory now, or at the most so far."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["VmHWM" if largest else "VmRSS"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux: the largest is all that can be asked for
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def measure_point(case: Case, precision: Precision) -> dict[str, Any]:
    """Time and peak memory of a case, for a fresh process."""
    keep_memory()  # as the nelbo command does
    if case.threads:
        torch.set_num_threads(case.threads)
    before = resident()
    trainer = make_trainer(case, precision)
    seconds = [timed(trainer.take_step) for _ in range(1 + case.repeats)][1:]
    if trainer.accelerator.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resident(largest=True) - before
    return {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "flops_per_step": record(trainer).flops()["total"],
        "seconds_per_step": spread(seconds),
        "peak_bytes": memory,
    }


def points(case: Case) -> list[tuple[str, int, Case]]:
    """The base, and each of levels, channels, pixels and batch halved and doubled: (what, value, case)."""
    found = [("base", 0, case)]
    for name in ("levels", "channels", "size", "batch"):
        value = getattr(case, name)
        for changed in (value // 2, 2 * value):
            if changed:
                what, shown = ("pixels", changed**2) if name == "size" else (name, changed)
                found.append((what, shown, replace(case, **{name: changed})))
    return found


def sweep(case: Case, precision: Precision) -> list[dict[str, Any]]:
    """All points, each in a fresh process, with and without checkpointing."""
    rows = []
    for what, value, point in points(case):
        row: dict[str, Any] = {"what": what, "value": value}
        for name, checkpointing in (("plain", False), ("checkpointing", True)):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                again = replace(point, checkpointing=checkpointing)
                row[name] = pool.submit(measure_point, again, precision).result()
        rows.append(row)
    return rows


# Report ---------------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model, flags = platform.processor() or platform.machine(), set[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    except OSError:
        pass
    return {
        "torch": torch.__version__,
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "flags": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "waiting": {k: v for k, v in os.environ.items() if k in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "load": [round(v, 2) for v in os.getloadavg()],
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned Markdown."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)])


def show(values: dict[str, float], scale: float = 1, digits: int = 0) -> str:
    """median (min..max)."""
    median, low, high = (f"{scale * values[k]:.{digits}f}" for k in ("median", "min", "max"))
    return f"{median} ({low}..{high})"


def show_measurement(results: dict[str, dict[str, Any]]) -> str:
    """The table of ``measure``."""
    lines: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("whole step, ms", lambda r: show(r["seconds_per_step"], 1e3)),
        ("whole step, images/s", lambda r: show(r["images_per_second"], digits=2)),
        ("whole step, GFLOP/s", lambda r: show(r["gflops"])),
        ("3x3 convolutions alone, GFLOP/s", lambda r: show(r["convolutions_3x3_gflops"])),
        ("all convolutions alone, GFLOP/s", lambda r: show(r["convolutions_gflops"])),
        ("GEMM peak, GFLOP/s", lambda r: f"{show(r['gemm_gflops'])}, {r['gemm']}"),
        ("**step / 3x3 convolutions, %**", lambda r: f"**{show(r['step_over_convolutions_3x3'], 100)}**"),
        ("step / all convolutions, %", lambda r: show(r["step_over_convolutions"], 100)),
        ("step / GEMM peak, %", lambda r: show(r["step_over_gemm"], 100)),
        ("all convolutions' time alone / step's, %", lambda r: show(r["convolutions_share_of_time"], 100)),
    ]
    if all(r["peak_bytes"] for r in results.values()):
        lines.append(("memory of the GPU at the peak, MiB", lambda r: f"{r['peak_bytes'] / 2**20:.0f}"))
    rows = [[name, *(cell(r) for r in results.values())] for name, cell in lines]
    return table(["median (min..max)", *results], rows)


def show_sweep(rows: list[dict[str, Any]]) -> str:
    """The table of ``sweep``; the factors are against the base."""
    base, cells = rows[0]["plain"], []
    for row in rows:
        plain, again = row["plain"], row["checkpointing"]
        time_, memory = plain["seconds_per_step"]["median"], plain["peak_bytes"]
        cells.append([
            row["what"], str(row["value"] or ""), f"{plain['parameters'] / 1e6:.3g}",
            f"{plain['flops_per_step'] / 1e9:.4g}", show(plain["seconds_per_step"], 1e3),
            f"{time_ / base['seconds_per_step']['median']:.2f}", f"{memory / 2**20:.0f}",
            f"{memory / base['peak_bytes']:.2f}", show(again["seconds_per_step"], 1e3),
            f"{again['peak_bytes'] / 2**20:.0f}",
        ])  # fmt: skip
    header = ["varied", "value", "M parameters", "GFLOP/step", "ms/step", "x base", "peak MiB", "x base",
              "ms/step, checkpointing", "peak MiB, checkpointing"]  # fmt: skip
    return table(header, cells)


def write_between(page: Path, name: str, text: str) -> None:
    """Replace what stands in a page between ``<!-- name -->`` and ``<!-- end name -->``; lines of prose are broken."""
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    whole = page.read_text()
    if whole.count(begin) != 1 or whole.count(end) != 1 or whole.index(begin) > whole.index(end):
        raise SystemExit(f"{page} must have {begin} once and {end} once after it")
    blocks = [
        block if block[0] in "|!" else textwrap.fill(block, 120, break_long_words=False, break_on_hyphens=False)
        for block in text.strip().split("\n\n")
    ]
    joined = "\n\n".join(blocks)
    page.write_text(f"{whole.partition(begin)[0]}{begin}\n{joined}\n{end}{whole.partition(end)[2]}")


def main(case: Case) -> dict[str, Any]:
    """Measure, print, and write what was asked for."""
    keep_memory()  # as the nelbo command does
    if case.threads:
        torch.set_num_threads(case.threads)
    report: dict[str, Any] = {"case": asdict(case) | {"out": None}, "machine": machine(), "formula": FORMULA}
    info = report["machine"]
    print(
        f"{case.preset}: {case.channels} channels, {case.levels} levels, batch {case.batch} of "
        f"{case.image_channels}x{case.size}x{case.size}; torch {info['torch']}, {info['device']}: {info['cpu']} "
        f"({' '.join(info['flags'])}), {info['threads']} threads on {info['cores']} cores, load {info['load'][0]}"
    )
    print(f"operations: {FORMULA}")
    if case.sweep:
        report["sweep"] = {}
        for precision in case.precision:
            report["sweep"][precision] = sweep(case, precision)
            print(f"\n{precision}\n\n{show_sweep(report['sweep'][precision])}", flush=True)
    else:
        report["results"] = {precision: measure(case, precision) for precision in case.precision}
        first = next(iter(report["results"].values()))
        counts = ", ".join(f"{kind} {n / 1e9:.4g}" for kind, n in first["flops_per_step"].items())
        print(f"{first['parameters']:,} parameters; GFLOP a step: {counts}\n\n{show_measurement(report['results'])}")
    if case.profile:
        report["profile"] = {precision: profile(case, precision) for precision in case.precision}
        for precision, rows in report["profile"].items():
            cells = [[r["operator"], f"{r['calls']:.0f}", f"{r['ms']:.1f}", f"{100 * r['share']:.1f}"] for r in rows]
            print(f"\n{precision}\n\n{table(['operator', 'calls', 'ms', '%'], cells)}")
    info["load_after"] = [round(v, 2) for v in os.getloadavg()]
    print(f"\nload {info['load'][0]} before, {info['load_after'][0]} after")
    if case.out is not None:
        case.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main(tyro.cli(Case, description=__doc__))
