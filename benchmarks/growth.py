r"""How cost grows, and what limits it: training steps and likelihoods, measured, fitted and plotted.

A cost is measured at several sizes x_i, one varied at a time, and fitted by a power through its medians y_i:

    (1)  log y = a + p log x    p = sum_i (x'_i - x') (y'_i - y')/S,  S = sum_i (x'_i - x')^2,   x' = log x, y' = log y
    (2)  error(p)^2 = sum_i r_i^2 / ((n - 2) S)                      r_i: what the line leaves; needs n >= 3

- **training**: the sweep of training_step.py (levels, channels, pixels, batch; time and peak memory, with and without
  checkpointing), or one that it wrote (``--sweep``). What limits a step: the time by operator at the base and at each
  doubled size, and the part of the peak memory that weights, gradient, two moments and average (20 bytes a parameter)
  take. The rest is activations and what libraries keep.
- **processes**: a step of the same global batch by one process with all threads and by as many processes of one thread
  as there are threads (gloo). What limits them: the same step without the exchange of gradients, in turns with it, and
  the step of one process of one thread that has only its share of the batch and nobody beside it.
- **evaluation**: the bound against images and times, the likelihood by ODE against images, importance samples K and the
  solver's steps. What limits them: rows of the network (an image once through it), the time inside its forward pass
  and inside the derivatives, and the seconds a row. And by several processes, whose own work is timed until they have
  to wait for the others.

``--quick`` does all of it at small sizes, which says that it works and not what things cost.

    python benchmarks/growth.py --threads 2 --out growth.json --write docs/performance.md
    python benchmarks/growth.py --from growth.json --write docs/performance.md       the same tables and plots again
"""

import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Literal

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import training_step as shared  # which chooses how threads wait, and loads torch

# isort: split
import numpy as np
import torch
import tyro

from nelbo import likelihood
from nelbo.compose import build_model
from nelbo.group import join
from nelbo.presets import preset
from nelbo.process import keep_memory

STATE = 20  # bytes of a parameter: weight, gradient, two moments, average
KINDS = {
    "convolutions": ("convolution",),
    "attention": ("scaled_dot_product", "bmm", "aten::_softmax"),
    "dense": ("aten::mm", "aten::addmm"),
}
LOOSE = {"rtol": 1.0, "atol": 1.0}  # with random weights the default tolerance takes other steps than least_steps
Part = Literal["training", "processes", "evaluation"]


@dataclass(frozen=True)
class Case:
    """What is measured."""

    parts: tuple[Part, ...] = ("training", "processes", "evaluation")
    """Which of the three."""
    precision: tuple[shared.Precision, ...] = ("float32", "bf16")
    """Precisions of the training steps; the rest is in float32."""
    preset: str = "vdm-digits"
    """The preset whose likelihoods are evaluated, with random weights, on 8x8 images."""
    threads: int = os.cpu_count() or 1
    """Threads of one process, and the number of processes that are held against it."""
    repeats: int = 3
    """Repeats, after a warm-up."""
    quick: bool = False
    """Small sizes, the first precision and the small model only: about two minutes."""
    sweep: Path | None = None
    """A JSON file of training_step.py --sweep, in place of measuring that again."""
    out: Path | None = None
    """A JSON file for all figures."""
    write: Path | None = None
    """A page whose text between <!-- growth --> and <!-- end growth --> becomes the tables; its plots go to images/."""
    plots: Path | None = None
    """A folder for the plots, where they do not go beside --write."""
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """A JSON file of --out: show it again, and measure nothing."""


def base_case(case: Case) -> shared.Case:
    """The step whose growth is measured."""
    sizes = {"channels": 32, "levels": 2, "batch": 4, "size": 16} if case.quick else {}
    return shared.Case(**sizes, threads=case.threads, repeats=case.repeats)


# Training -------------------------------------------------------------------------------------------------------------


def shares(point: shared.Case, precision: shared.Precision) -> dict[str, float]:
    """Parts of a step's time by kind of operator, for a fresh process."""
    keep_memory()
    if point.threads:
        torch.set_num_threads(point.threads)
    found = dict.fromkeys((*KINDS, "rest"), 0.0)
    for row in shared.profile(point, precision, steps=1, rows=10_000):
        kind = next((k for k, names in KINDS.items() if any(n in row["operator"] for n in names)), "rest")
        found[kind] += row["share"]
    return found


def training(case: Case) -> dict[str, Any]:
    """The sweep by precision, and where the time goes at its base and its doubled sizes."""
    measured: dict[str, Any] = {}
    given = json.loads(case.sweep.read_text()) if case.sweep else None
    for precision in case.precision[: 1 if case.quick else None]:
        base = base_case(case)
        if given:
            base = replace(base, **{k: given["case"][k] for k in ("preset", "channels", "levels", "batch", "size")})
            if precision not in given["sweep"]:
                raise SystemExit(f"{case.sweep} has no sweep in {precision}; it has {', '.join(given['sweep'])}")
        rows = given["sweep"][precision] if given else shared.sweep(base, precision)
        points = [(what, value, point) for what, value, point in shared.points(base)]
        doubled = {what: (value, point) for what, value, point in points}  # the last of each is the largest
        by_kind = []
        for what, (value, point) in doubled.items():
            if case.quick:
                by_kind.append({"what": what, "value": value, **shares(point, precision)})
                continue
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                by_kind.append({"what": what, "value": value, **pool.submit(shares, point, precision).result()})
        measured[precision] = {
            "base": {"levels": base.levels, "channels": base.channels, "pixels": base.size**2, "batch": base.batch},
            "sweep": rows, "shares": by_kind,
        }  # fmt: skip
    return measured


# Several processes ----------------------------------------------------------------------------------------------------


def run_group(function: str, task: dict[str, Any], processes: int, threads: int) -> list[dict[str, Any]]:
    """What a function of this file says in each of some fresh processes, started as srun starts them."""
    # accelerate takes all cores for each process of a group where OMP_NUM_THREADS does not say otherwise.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import growth; growth.member({function!r}, sys.argv[1])"
    group = [
        subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(task | {"threads": threads})], stdout=subprocess.PIPE, text=True,
            env=environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes),
                               "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]  # fmt: skip
    try:
        said = [process.communicate()[0] for process in group]
    finally:
        for process in group:
            process.kill()
    if any(process.returncode for process in group):
        raise SystemExit(f"a process of {function} ended with an error; its own lines say which")
    return [json.loads(text.splitlines()[-1]) for text in said]


def member(function: str, text: str) -> None:
    """One of the processes: do it and say what was found."""
    task = json.loads(text)
    keep_memory()
    torch.set_num_threads(task["threads"])
    found = {"take_steps": take_steps, "evaluate": evaluate}[function](task)
    print(json.dumps(found), flush=True)
    join().close()


def take_steps(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of steps with the exchange of gradients and, in turns, without."""
    before = shared.resident()
    trainer = shared.make_trainer(shared.Case(**task["case"]), "float32")
    exchanging = trainer.exchanging
    found: dict[str, list[float]] = {"with": [], "without": []}
    for turn in range(1 + task["repeats"]):
        for name in found if trainer.processes > 1 else ["with"]:
            trainer.exchanging = exchanging if name == "with" else lambda now: exchanging(False)  # type: ignore[method-assign]
            trainer.group.wait()
            seconds = shared.timed(trainer.take_step)
            if turn:
                found[name].append(seconds)
    return {
        "threads": torch.get_num_threads(), "seconds": found["with"], "without_exchange": found["without"],
        "peak_bytes": shared.resident(largest=True) - before,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
    }  # fmt: skip


def arrangements(threads: int) -> dict[str, tuple[int, int]]:
    """Name -> (processes, threads of each)."""
    return {
        "1 process, 1 thread": (1, 1),
        f"1 process, {threads} threads": (1, threads),
        f"{threads} processes, 1 thread each": (threads, 1),
    }


def processes(case: Case) -> dict[str, Any]:
    """Training steps of a small and of a larger model by one process and by several, and one's share by itself."""
    small = {"preset": "vdm-digits", "channels": 32, "levels": 4, "batch": 64, "size": 8, "image_channels": 1,
             "grey_levels": 17}  # fmt: skip
    base = base_case(case)
    large = {"preset": base.preset, "channels": base.channels, "levels": base.levels, "batch": base.batch,
             "size": base.size}  # fmt: skip
    n, repeats, results = case.threads, case.repeats, {}
    for one in (small,) if case.quick else (small, large):
        if one["batch"] % n:
            raise SystemExit(f"--threads must divide the batch, {one['batch']}, got {n}")
        times = max(repeats, 1 if case.quick else 20) if one is small else repeats
        found = {}
        for name, (count, threads) in arrangements(n).items():
            found[name] = run_group("take_steps", {"case": one, "repeats": times}, count, threads)
        part = one | {"batch": one["batch"] // n}
        found["share"] = run_group("take_steps", {"case": part, "repeats": times}, 1, 1)
        results[f"{one['preset']}, {one['channels']} channels, batch {one['batch']}"] = found
    return results


# Evaluation -----------------------------------------------------------------------------------------------------------


class Watch:
    """Within it, the time inside a model's network and inside derivatives is counted, and the network's rows."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network, self.rows, self.seconds = network, 0, {"network": 0.0, "derivatives": 0.0}

    def __enter__(self) -> "Watch":
        self.grad, self.forward = torch.autograd.grad, self.network.forward

        def forward(*arguments: Any, **keywords: Any) -> Any:
            out = self.timed("network", self.forward, *arguments, **keywords)
            self.rows += len(out[0] if isinstance(out, tuple) else out)
            return out

        self.network.forward = forward
        torch.autograd.grad = lambda *a, **k: self.timed("derivatives", self.grad, *a, **k)
        return self

    def __exit__(self, *_: object) -> None:
        torch.autograd.grad = self.grad
        del self.network.forward  # the class's again

    def timed(self, what: str, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Its result, the time counted."""
        begun = time.perf_counter()
        result = function(*arguments, **keywords)
        self.seconds[what] += time.perf_counter() - begun
        return result


def evaluate(task: dict[str, Any]) -> dict[str, Any]:
    """Each of the task's likelihoods, every one once and then again; by one process of a group, or alone."""
    group, method = join(), task["method"]
    model = build_model(preset(task["preset"]), (1, 8, 8), 17).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.01, generator=draw)
    images = np.random.default_rng(0).integers(0, 17, (max(p["images"] for p in task["points"]), 1, 8, 8))
    images = images.astype(np.uint8)
    assert isinstance(model.network, torch.nn.Module)
    found: list[dict[str, Any]] = [{"seconds": [], "own": [], "network": [], "derivatives": []} for _ in task["points"]]
    merge, ended = group.merge, 0.0

    def noted(*arrays: np.ndarray) -> None:
        nonlocal ended
        ended = time.perf_counter()
        merge(*arrays)

    for turn in range(1 + task["repeats"]):
        points = task["points"] if turn else task["points"][:1]
        for point, record in zip(points, found, strict=False):
            options = {name: value for name, value in point.items() if name != "images"}
            group.wait()
            with Watch(model.network) as watch:
                group.merge = noted  # type: ignore[method-assign]
                begun = time.perf_counter()
                call = likelihood.vlb if method == "vlb" else likelihood.ode
                result = call(model, images[: point["images"]], group=group, **options)
                seconds = time.perf_counter() - begun
                group.merge = merge  # type: ignore[method-assign]
            if turn:
                record["seconds"].append(seconds)
                record["own"].append(ended - begun)
                for what, value in watch.seconds.items():
                    record[what].append(value)
                record |= {"rows": watch.rows, "mean": result.mean}
    return {"points": found}


def evaluation_points(case: Case) -> dict[str, list[dict[str, Any]]]:
    """Method and what is varied -> its points; the others at their base."""
    bound: dict[str, Any] = {"images": 64, "times_per_shift": 8, "shifts": 2, "batch": 256}
    flow: dict[str, Any] = {"images": 16, "samples": 1, "least_steps": 56, "replicates": 1, "batch": 16, **LOOSE}
    varied: dict[str, tuple[dict[str, Any], str, tuple[int, ...]]] = {
        "vlb, images": (bound, "images", (32, 64, 128, 256, 512)),
        "vlb, times": (bound, "times_per_shift", (4, 8, 16, 32, 64)),
        "ode, images": (flow, "images", (16, 32, 64, 128)),
        "ode, K": (flow, "samples", (1, 2, 4, 8)),
        "ode, solver's steps": (flow, "least_steps", (28, 56, 112, 224)),
    }
    if case.quick:
        bound |= {"images": 8, "batch": 16, "times_per_shift": 2}
        flow |= {"images": 2, "batch": 2, "least_steps": 4}
        varied = {
            "vlb, images": (bound, "images", (8, 16, 32)), "vlb, times": (bound, "times_per_shift", (2, 4, 8)),
            "ode, images": (flow, "images", (2, 4, 8)), "ode, K": (flow, "samples", (1, 2, 4)),
            "ode, solver's steps": (flow, "least_steps", (4, 8, 16)),
        }  # fmt: skip
    return {name: [base | {field: value} for value in values] for name, (base, field, values) in varied.items()}


FIELDS = {"images": "images", "times": "times_per_shift", "K": "samples", "solver's steps": "least_steps"}


def evaluation(case: Case) -> dict[str, Any]:
    """All points of a method in one fresh process, in turns, and the largest of each by several processes."""
    results: dict[str, Any] = {"grown": {}, "processes": {}}
    grid = evaluation_points(case)
    for method in ("vlb", "ode"):
        points = [(name, point) for name, points in grid.items() if name.startswith(method) for point in points]
        task = {"method": method, "preset": case.preset, "points": [p for _, p in points], "repeats": case.repeats}
        (found,) = run_group("evaluate", task, 1, case.threads)
        for (name, point), record in zip(points, found["points"], strict=True):
            value = point[FIELDS[name.partition(", ")[2]]]
            results["grown"].setdefault(name, []).append({"value": value, **record})
    for name in ("vlb, images", "ode, images"):
        task = {"method": name[:3], "preset": case.preset, "points": grid[name][-1:], "repeats": case.repeats}
        results["processes"][name[:3]] = {
            label: [found["points"][0] for found in run_group("evaluate", task, count, threads)]
            for label, (count, threads) in arrangements(case.threads).items()
        }
    return results


# Report ---------------------------------------------------------------------------------------------------------------


def fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Equations (1) and (2): the exponent and its standard error, nan for two points."""
    u, v = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    u, v = u - u.mean(), v - v.mean()
    spread = float(u @ u)
    slope = float(u @ v) / spread
    left = v - slope * u
    return slope, math.sqrt(float(left @ left) / (len(u) - 2) / spread) if len(u) > 2 else math.nan


def _power(x: Sequence[float], y: Sequence[float]) -> str:
    return "{:.2f} ± {:.2f}".format(*fit(x, y))


def grown(measured: dict[str, Any]) -> dict[str, tuple[list[int], list[dict[str, Any]]]]:
    """The sweep by what is varied: values in order, with the base among them, and their rows."""
    rows, found = measured["sweep"], {}
    for what, value in measured["base"].items():
        points = [(value, rows[0]), *((r["value"], r) for r in rows if r["what"] == what)]
        points.sort(key=lambda point: point[0])
        found[what] = [v for v, _ in points], [r for _, r in points]
    return found


def show_training(measured: dict[str, Any], precision: str) -> str:
    """The sweep, its exponents, where the time goes, and what that says."""
    lines = []
    for what, (values, rows) in grown(measured).items():
        columns = [
            [row[kind][name] if name == "peak_bytes" else row[kind][name]["median"] for row in rows]
            for name in ("seconds_per_step", "peak_bytes")
            for kind in ("plain", "checkpointing")
        ]
        operations = [row["plain"]["flops_per_step"] for row in rows]
        lines.append([what, ", ".join(map(str, values)), *(_power(values, y) for y in (operations, *columns))])
    head = ["varied", "values", "operations", "time", "time, checkpointing", "peak memory", "memory, checkpointing"]
    by_kind = measured["shares"]
    rows = [
        [f"{row['what']} {row['value'] or ''}".strip(), *(f"{100 * row[k]:.1f}" for k in (*KINDS, "rest"))]
        for row in by_kind
    ]
    base = by_kind[0]
    most = max((*KINDS, "rest"), key=lambda kind: base[kind])
    text = f"What limits a step: {most}, {100 * base[most]:.0f} % of its time at the base."
    seconds = {(r["what"], r["value"]): r["plain"]["seconds_per_step"]["median"] for r in measured["sweep"]}
    for row in by_kind[1:]:
        times = seconds[row["what"], row["value"]] / seconds["base", 0]
        factors = ", ".join(f"{k} {times * row[k] / base[k]:.1f}" for k in (*KINDS, "rest") if base[k])
        text += f" With {row['what']} {row['value']} a step takes {times:.1f} times as long: {factors}."
    plain = {what: rows[-1]["plain"] for what, (_, rows) in grown(measured).items()}
    state = ", ".join(f"{100 * STATE * p['parameters'] / p['peak_bytes']:.0f} % at twice the {what}" if what != "pixels"
                      else f"{100 * STATE * p['parameters'] / p['peak_bytes']:.0f} % at four times the pixels"
                      for what, p in plain.items())  # fmt: skip
    first = measured["sweep"][0]["plain"]
    text += (
        f" What limits memory: weights, gradient, moments and average are "
        f"{100 * STATE * first['parameters'] / first['peak_bytes']:.0f} % of the peak at the base ({state}); the rest "
        "is activations and what the libraries keep."
    )
    return "\n\n".join([
        f"A training step in {precision}:", shared.show_sweep(measured["sweep"]),
        "Exponents, ± standard error:", shared.table(head, lines),
        "Time by operator, %, at the base and at the largest of each:", shared.table(["", *KINDS, "rest"], rows), text,
    ])  # fmt: skip


def _slowest(found: list[dict[str, Any]], name: str = "seconds") -> list[float]:
    """By repeat, the slowest process's."""
    return [max(values) for values in zip(*(f[name] for f in found), strict=True)]


def show_processes(results: dict[str, Any], threads: int) -> str:
    """Steps by one process and by several, and where the difference comes from."""
    names, rows, text = list(arrangements(threads)), [], []
    for model, found in results.items():
        whole = statistics.median(_slowest(found[names[1]]))
        for name in names:
            seconds = shared.spread(_slowest(found[name]))
            rows.append([
                model, name, shared.show(seconds, 1e3, 1), f"{whole / seconds['median']:.2f}",
                " + ".join(f"{f['peak_bytes'] / 2**20:.0f}" for f in found[name]),
            ])  # fmt: skip
        several, alone = found[names[2]], statistics.median(found["share"][0]["seconds"])
        taken, without = (statistics.median(_slowest(several, k)) for k in ("seconds", "without_exchange"))
        text.append(
            f"{model}: of {1e3 * taken:.1f} ms of {names[2]}, {100 * (1 - without / taken):.0f} % are the exchange of "
            f"{4 * several[0]['parameters'] / 2**20:.1f} MiB of gradients (the same step without it takes "
            f"{1e3 * without:.1f} ms), and {100 * (without - alone) / taken:.0f} % what processes cost each other "
            f"otherwise (one thread with its part of the batch, alone: {1e3 * alone:.1f} ms)."
        )
    head = ["step", "", "ms", f"as fast as {names[1]}", "peak MiB"]
    return "\n\n".join(["Steps of the same global batch, by the number of processes:", shared.table(head, rows), *text])


def show_evaluation(results: dict[str, Any], threads: int) -> str:
    """Seconds of likelihoods, their exponents, and what they are spent on."""
    rows, least = [], {"vlb": 1.0, "ode": 1.0}
    for name, points in results["grown"].items():
        values, counted = [p["value"] for p in points], [p["rows"] for p in points]
        medians = [statistics.median(p["seconds"]) for p in points]
        parts = {
            k: statistics.median([v / s for p in points for v, s in zip(p[k], p["seconds"], strict=True)])
            for k in ("network", "derivatives")
        }
        least[name[:3]] = min(least[name[:3]], sum(parts.values()))
        each = [1e3 * s / n for s, n in zip(medians, counted, strict=True)]
        rows.append([
            name, ", ".join(map(str, values)), f"{medians[0]:.3f} .. {medians[-1]:.3f}", _power(values, medians),
            _power(values, counted), f"{each[0]:.3f} .. {each[-1]:.3f}", *(f"{100 * v:.0f}" for v in parts.values()),
        ])  # fmt: skip
    head = ["varied", "values", "seconds", "exponent", "exponent of rows", "ms a row", "% in the network",
            "% in derivatives"]  # fmt: skip
    text = ["Likelihoods, one process; a row is an image once through the network:", shared.table(head, rows)]
    text.append(
        f"What limits them: the network's evaluations and their derivatives, at least {100 * least['vlb']:.0f} % of "
        f"the bound's time and {100 * least['ode']:.0f} % of the ODE's. Seconds grow as the rows do, as far as the "
        "time of a row stays the same."
    )
    names, rows, notes = list(arrangements(threads)), [], []
    for method, found in results["processes"].items():
        whole = statistics.median(_slowest(found[names[1]]))
        for name in names:
            seconds = shared.spread(_slowest(found[name]))
            rows.append([method, name, shared.show(seconds, digits=3), f"{whole / seconds['median']:.2f}"])
        several, alone = found[names[2]], found[names[0]][0]
        waited = statistics.median([
            1 - own / total for f in several for own, total in zip(f["own"], f["seconds"], strict=True)
        ])  # fmt: skip
        a, b = (sum(sum(f["network"]) + sum(f["derivatives"]) for f in group) for group in (several, [alone]))
        same = "the same" if {f["mean"] for f in several} == {alone["mean"]} else "not the same"
        notes.append(
            f"{method}, {names[2]}: a process waits for the others {100 * waited:.1f} % of the time, and their "
            f"networks take {b and a / b:.2f} times the time that one thread takes alone; the figure is {same} to the "
            "last bit."
        )
    head = ["likelihood", "", "seconds", f"as fast as {names[1]}"]
    return "\n\n".join([*text, "By the number of processes:", shared.table(head, rows), *notes])


def show(report: dict[str, Any]) -> str:
    """Everything, and what it was measured on."""
    parts, info, threads = [], report["machine"], report["case"]["threads"]
    for precision, measured in report.get("training", {}).items():
        parts.append(show_training(measured, precision))
    if "processes" in report:
        parts.append(show_processes(report["processes"], threads))
    if "evaluation" in report:
        parts.append(show_evaluation(report["evaluation"], threads))
    peaks = "; ".join(
        f"{precision} {' and '.join(shared.show(p['gflops']) for p in found)}"
        for precision, found in report["gemm"].items()
    )
    parts.append(
        f"{threads} threads on {info['cores']} cores of an {info['cpu']} ({' '.join(info['flags'])}), torch "
        f"{info['torch']}; GEMM peak before and after, GFLOP/s: {peaks}; load {info['load'][0]} before, "
        f"{info['load_after'][0]} after (the run itself){'; `--quick`' if report['case']['quick'] else ''}."
    )
    return "\n\n".join(parts)


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """The plots: growth-training.png and growth-evaluation.png, as far as they were measured."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    from nelbo.report.figures import RUN_COLOURS, STYLE

    names, drawn = list(arrangements(report["case"]["threads"])), []

    def lines(axes: Any, curves: dict[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str) -> None:
        for colour, (label, (xs, ys)) in zip(RUN_COLOURS, curves.items(), strict=False):
            axes.plot([v / xs[0] for v in xs], ys, "o-", ms=3, color=colour, label=f"{label}: {fit(xs, ys)[0]:.2f}")
        axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
        axes.xaxis.set_major_locator(FixedLocator([2.0**k for k in range(8)]))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
            axis.set_minor_locator(NullLocator())
        axes.legend(title="exponent", title_fontsize=8.5)

    def bars(axes: Any, found: dict[str, dict[str, Any]]) -> None:
        height = 0.8 / len(found)
        for i, (label, by_name) in enumerate(found.items()):
            whole = statistics.median(_slowest(by_name[names[1]]))
            speed = [whole / statistics.median(_slowest(by_name[name])) for name in names]
            places = [j + (i - (len(found) - 1) / 2) * height for j in range(len(names))]
            axes.barh(places, speed, height * 0.9, color=RUN_COLOURS[i], label=label)
        axes.set_yticks(range(len(names)), [name.replace(", ", ",\n") for name in names])
        axes.invert_yaxis()
        axes.set_xlabel("speed relative to the second")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.2, 1), fontsize=7.5)

    def page(name: str, panels: list[Callable[[Any], None]]) -> None:
        figure = Figure(figsize=(4 * len(panels), 3.6), layout="constrained")
        for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
            panel(axes)
        folder.mkdir(parents=True, exist_ok=True)
        drawn.append(folder / name)
        figure.savefig(drawn[-1], dpi=110)

    with matplotlib.rc_context(STYLE):
        if "training" in report:
            precision, measured = next(iter(report["training"].items()))
            curves = grown(measured)
            time_ = {
                w: (v, [r["plain"]["seconds_per_step"]["median"] for r in rows]) for w, (v, rows) in curves.items()
            }
            memory = {w: (v, [r["plain"]["peak_bytes"] / 2**20 for r in rows]) for w, (v, rows) in curves.items()}
            panels: list[Callable[[Any], None]] = [
                lambda axes: lines(axes, time_, "times the smallest", f"seconds a step, {precision}"),
                lambda axes: lines(axes, memory, "times the smallest", "peak memory, MiB"),
            ]
            if "processes" in report:
                panels.append(lambda axes: bars(axes, report["processes"]))
            page("growth-training.png", panels)
        if "evaluation" in report:
            found = report["evaluation"]
            panels = []
            for method, label in (("vlb", "bound, seconds"), ("ode", "ODE, seconds")):
                of_it = {
                    name.partition(", ")[2]: (
                        [p["value"] for p in points], [statistics.median(p["seconds"]) for p in points]
                    )
                    for name, points in found["grown"].items() if name.startswith(method)
                }  # fmt: skip
                panels.append(lambda axes, c=of_it, y=label: lines(axes, c, "times the smallest", y))  # type: ignore[misc]
            panels.append(lambda axes: bars(axes, found["processes"]))
            page("growth-evaluation.png", panels)
    return drawn


def main(case: Case) -> dict[str, Any]:
    """Measure, print, draw, and write what was asked for."""
    if case.source:
        report = json.loads(case.source.read_text())
    else:
        keep_memory()  # as the nelbo command does
        torch.set_num_threads(case.threads)
        report = {
            "case": json.loads(json.dumps(asdict(case), default=str)), "machine": shared.machine(),
            "gemm": {precision: [shared.gemm_peak(precision)] for precision in case.precision},
        }  # fmt: skip
        begun = time.monotonic()
        for name, measure in (("training", training), ("processes", processes), ("evaluation", evaluation)):
            if name in case.parts:
                report[name] = measure(case)
                print(f"{name} done after {time.monotonic() - begun:.0f} s", file=sys.stderr)
        for precision, found in report["gemm"].items():
            found.append(shared.gemm_peak(precision))
        report["machine"]["load_after"] = shared.machine()["load"]
        if case.out:
            case.out.write_text(json.dumps(report, indent=1) + "\n")
    text = show(report)
    print(text)
    folder = case.plots or (case.write.parent / "images" if case.write else None)
    drawn = draw(report, folder) if folder else []
    if case.write:
        alone = {"growth-training.png": "A training step", "growth-evaluation.png": "Likelihoods"}
        links = [f"![{alone[p.name]}: how cost grows]({os.path.relpath(p, case.write.parent)})" for p in drawn]
        shared.write_between(case.write, "growth", "\n\n".join([*links, text]))
    return report


if __name__ == "__main__":
    main(tyro.cli(Case, description=__doc__))
