"""The experiments of docs/experiments.md: a resumable queue, one thread a training, two trainings at once.

    python experiments/run.py queue            run what has no result yet; stop it at any time, and run it again
    python experiments/run.py tables           write the tables and figures of docs/experiments.md from the results
    python experiments/run.py list             what the queue holds, and what is done
    python experiments/run.py cost             time training steps beside each other, on an idle machine

Every entry is a `nelbo train` of a preset with the overrides below and a seed, and evaluations of it; a finished entry
leaves one record in experiments/results.json, which is what the tables are made of. Runs stay in runs/experiments.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results.json"
COST = HERE / "cost.json"
RUNS = ROOT / "runs" / "experiments"
PAGE = ROOT / "docs" / "experiments.md"

SEEDS = (0, 1, 2)
# A constant learning rate, so that the curves of one run can be read at any step.
DIGITS = (
    "--optimizer.decay none --optimizer.learning-rate 2e-3 --training.steps 2000 "
    "--training.evaluate-every 16000 --training.evaluate-times 8"
).split()
PHOTOS = (
    "--optimizer.decay none --optimizer.learning-rate 1e-3 --training.steps 500 "
    "--training.evaluate-every 2000 --training.save-every 4000"
).split()
MAIN = ("vdm", "mulan", "mulan-velocity")
ABLATIONS = (
    "mulan-no-latent", "mulan-scalar", "mulan-monotone", "mulan-linear", "mulan-label", "mulan-image",
    "mulan-one-hot", "mulan-gaussian", "mulan-paper", "mulan-pixel-noise",
)  # fmt: skip
STEPS = (10, 25, 50, 100, 250, 500, 1000)
TRAINING: dict[Path, threading.Lock] = {}  # by run: two entries may begin with the same one, which one of them trains


@dataclass(frozen=True)
class Entry:
    """One training: a preset, overrides that the name stands for, and a seed."""

    name: str
    preset: str
    overrides: tuple[str, ...]
    seed: int
    finite: bool = False
    start: tuple[str, tuple[str, ...]] | None = None  # the preset and overrides of the run whose weights it begins with
    figures: tuple[str, ...] = ()  # other figures too, of FIGURES

    @property
    def key(self) -> str:
        """The name of its run and of its record."""
        return f"{self.name}-seed{self.seed}"


def entries() -> list[Entry]:
    """The queue, in the order in which it is worked off: the main comparison first, the photographs last."""
    queue = [Entry(f"{n}-digits", f"{n}-digits", tuple(DIGITS), s, True) for s in SEEDS for n in MAIN]
    queue += [Entry(name, preset, (*DIGITS, *changes.split()), 0) for name, preset, changes in FOLLOW_UPS]
    queue += [
        Entry(name, preset, (*DIGITS, *changes.split()), 0, start=(preset, tuple(DIGITS)) if tuned else None)
        for name, preset, changes, tuned in BEYOND
    ]
    queue += [Entry(f"{n}-digits", f"{n}-digits", tuple(DIGITS), seed) for seed in SEEDS for n in ABLATIONS]
    queue += [
        Entry(name, "ddpm-digits", (*DIGITS, *changes.split()), 0, figures=tuple(FIGURES)) for name, changes in DDPM
    ]
    queue += [Entry(name, name, (), 0, figures=(ODE,)) for name in FASHION]
    queue += [Entry(name, preset, tuple(DIGITS), seed) for seed in SEEDS for name, preset in SMALLER]
    return queue + [Entry(f"{n}-photos32", f"{n}-photos32", tuple(PHOTOS), 0) for n in MAIN]


LONGER = "--training.steps 6000"
# What follows from the main comparison (see docs/experiments.md): name, preset, changed fields.
FOLLOW_UPS: tuple[tuple[str, str, str], ...] = (
    # Is it the learned noise, or that VDM's ends move?
    ("vdm-digits-fixed-ends", "vdm-digits", "--schedule.ends fixed"),
    # Does the schedule learn too slowly, or too fast?
    ("mulan-digits-schedule-rate-x5", "mulan-digits", "--optimizer.schedule-learning-rate 1e-2"),
    ("mulan-digits-schedule-rate-x0.2", "mulan-digits", "--optimizer.schedule-learning-rate 4e-4"),
    # Is the latent too dear? Its charge left out of the loss, or down to a tenth; the bound charges it in full.
    ("mulan-digits-latent-free", "mulan-digits", "--objective.latent-weight 0"),
    ("mulan-digits-latent-at-a-tenth", "mulan-digits", "--objective.latent-weight 0.1"),
    # Too few steps? Three times as many.
    ("vdm-digits-x3-steps", "vdm-digits", LONGER),
    ("mulan-digits-x3-steps", "mulan-digits", LONGER),
)


# i-DODE, and what none of the four systems has: name, preset, changed fields, whether it goes on from trained weights.
TUNING = "--objective.second-order 0.1 --training.steps 500 --optimizer.learning-rate 5e-4"
BEYOND: tuple[tuple[str, str, str, bool], ...] = (
    ("idode-vp-digits", "idode-vp-digits", "", False),
    ("idode-sp-digits", "idode-sp-digits", "", False),
    ("mulan-digits-importance", "mulan-digits", "--objective.times importance", False),
    ("mulan-velocity-digits-importance", "mulan-velocity-digits", "--objective.times importance", False),
    ("mulan-velocity-digits-straight", "mulan-velocity-digits", "--path straight", False),
    ("idode-vp-digits-second-order", "idode-vp-digits", TUNING, True),
    ("idode-vp-digits-first-order", "idode-vp-digits", TUNING.replace("0.1", "0", 1), True),
    ("mulan-digits-second-order", "mulan-digits", TUNING, True),
    ("mulan-digits-first-order", "mulan-digits", TUNING.replace("0.1", "0", 1), True),
)


# Smaller networks around MuLAN's denoiser, and what a repeat on their machine changes: name, preset.
SMALLER = (
    ("mulan-digits-again", "mulan-digits"),
    ("mulan-small-schedule-digits", "mulan-small-schedule-digits"),
    ("mulan-factored-schedule-digits", "mulan-factored-schedule-digits"),
    ("mulan-small-encoder-digits", "mulan-small-encoder-digits"),
)


# DDPM's losses, on the network, steps and images of the others: name, changed fields.
DDPM = (
    ("ddpm-digits", ""),
    ("ddpm-digits-hybrid", "--objective.loss hybrid --reverse.variance learned"),
    ("ddpm-digits-bound", "--objective.loss bound --reverse.variance learned"),
    ("ddpm-digits-cosine", "--schedule.form cosine"),
)
MANY = ("--times", "200")  # most of the bound arises in the first few of 999 steps
ODE = "ODE, K = 1"
FIGURES = {
    "fixed-small": ("--variance", "fixed-small", *MANY),
    "fixed-large": ("--variance", "fixed-large", *MANY),
    "fixed-large, not clipped": ("--variance", "fixed-large", "--clip", "off", *MANY),
    "learned": ("--variance", "learned", *MANY),
    "continuous time": ("--steps", "0", *MANY),
    ODE: ("--method", "ode", "--images", "64"),
}
# The presets as they are, about an hour each.
FASHION = ("vdm-fashion", "mulan-fashion")
# The bound of each run is that of all test images, 16 times twice; of these sets fewer.
FEWER = {"photos32": ("--times", "8"), "fashion": ("--times", "8", "--images", "2000")}


def read_results() -> dict[str, Any]:
    """Records by key."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def _nelbo(log: Path, *arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with open(log, "a") as file:
        subprocess.run(
            [sys.executable, "-m", "nelbo.cli", *arguments], check=True, stdout=file, stderr=file, env=environment
        )


def _evaluation(run: Path, log: Path, *arguments: str, steps: int | None = 0) -> dict[str, Any]:
    before = set((run / "evaluations").glob("*.json"))
    given = () if steps is None else ("--steps", str(steps))
    _nelbo(log, "evaluate", str(run), "--checkpoint", "last", *given, *arguments)
    written = sorted(set((run / "evaluations").glob("*.json")), key=lambda p: p.stat().st_mtime)
    assert written, f"nelbo evaluate wrote nothing in {run} (it held {len(before)} files)"
    return json.loads(written[-1].read_text())


def carry_out(entry: Entry) -> dict[str, Any]:
    """Train (or continue) and evaluate one entry; its record."""
    run, log = RUNS / entry.key, RUNS / f"{entry.key}.log"
    RUNS.mkdir(parents=True, exist_ok=True)
    seed = ("--training.seed", str(entry.seed), "--threads", "1")
    begin: tuple[str, ...] = ()
    if entry.start is not None:
        preset, overrides = entry.start
        first = RUNS / f"{preset}-seed{entry.seed}"  # of the main comparison, or of i-DODE; trained if not there
        with TRAINING.setdefault(first, threading.Lock()):
            _nelbo(log, "train", preset, "--out", str(first), *seed, *overrides)
        begin = ("--init-from", str(first))
    with TRAINING.setdefault(run, threading.Lock()):
        _nelbo(log, "train", entry.preset, "--out", str(run), *seed, *entry.overrides, *begin)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [line for line in lines if line["kind"] == "evaluation"]
    own = json.loads((run / "run.json").read_text())["config"]["objective"]["steps"]
    few = next((given for ending, given in FEWER.items() if entry.preset.endswith(ending)), ())
    final = _evaluation(run, log, *few, steps=own)
    return {
        "name": entry.name,
        "preset": entry.preset,
        "overrides": list(entry.overrides),
        "seed": entry.seed,
        "parameters": json.loads((run / "run.json").read_text())["parameters"],
        "seconds": lines[-1]["seconds"],
        "curve": {
            "step": [line["step"] for line in curve],
            "seconds": [line["seconds"] for line in curve],
            "mean": [line["bits_per_dim"]["mean"] for line in curve],
            "standard_error": [line["bits_per_dim"]["standard_error"] for line in curve],
        },
        "test": {k: final[k] for k in ("bits_per_dim", "as_published", "draws_error", "terms", "images", "latent_use")},
        "baselines": final["baselines"],
        "finite": {str(steps): _evaluation(run, log, steps=steps)["bits_per_dim"] for steps in STEPS}
        if entry.finite and entry.seed == 0
        else {},
        "figures": {
            name: _evaluation(run, log, *arguments, steps=None)["bits_per_dim"]
            for name, arguments in FIGURES.items()
            if name in entry.figures and (name != "learned" or "learned" in entry.overrides)
        },
        "versions": final["versions"],
    }


def work(queue: list[Entry], at_once: int) -> None:
    """Carry out what has no record yet, ``at_once`` entries at a time; every record is written as it comes."""
    lock, done = threading.Lock(), read_results()
    waiting = [entry for entry in queue if entry.key not in done]
    print(f"{len(queue) - len(waiting)} of {len(queue)} done", flush=True)

    def worker() -> None:
        while True:
            with lock:
                if not waiting:
                    return
                entry = waiting.pop(0)
            print(f"begin {entry.key}", flush=True)
            try:
                record = carry_out(entry)
            except subprocess.CalledProcessError as error:
                print(f"FAILED {entry.key}: status {error.returncode}, see its log", flush=True)
                continue
            with lock:
                results = read_results()
                results[entry.key] = record
                aside = RESULTS.with_suffix(".tmp")
                aside.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
                aside.replace(RESULTS)
            bits = record["test"]["bits_per_dim"]
            print(
                f"done {entry.key}: {bits['mean']:.4f} ± {bits['standard_error']:.4f}, {record['seconds']:.0f} s",
                flush=True,
            )

    threads = [threading.Thread(target=worker) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure_cost(rounds: int = 7, steps: int = 15) -> None:
    """Milliseconds of a training step of each system, one thread, in turns: what minutes of the queue, where two
    trainings and other work share a machine, cannot say."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    import torch

    from nelbo.data import load
    from nelbo.presets import preset
    from nelbo.training import Trainer

    torch.set_num_threads(1)
    load_before = os.getloadavg()[0]
    names = [f"{n}-{data}" for data in ("digits", "photos32") for n in MAIN]
    trainers = {name: Trainer(preset(name), RUNS, load(preset(name).data.source)) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(rounds + 1):
        for name, trainer in trainers.items():
            count = steps if "digits" in name else 1
            begun = time.perf_counter()
            for _ in range(count):
                trainer.take_step()
            if repeat:  # the first warms up
                times[name].append(1000 * (time.perf_counter() - begun) / count)
    COST.write_text(json.dumps({"load_before": load_before, "milliseconds": times}, indent=1) + "\n")
    print(cost_table(read_results()))


def cost_table(results: dict[str, Any]) -> str:
    """Milliseconds of a step, relative to VDM's, and what it takes to reach VDM's last figure, in VDM's own time."""
    if not COST.exists():
        return "Not measured yet."
    measured, rows = json.loads(COST.read_text()), []
    times = measured["milliseconds"]
    for name, found in times.items():
        reference = f"vdm-{name.rpartition('-')[2]}"
        ratios = sorted(a / b for a, b in zip(found, times[reference], strict=True))
        ratio, reach = ratios[len(ratios) // 2], ""
        if name != reference and (parts := _reach_parts(results, name, reference)):
            mean, error = _mean([ratio * part for part in parts])
            reach = _shown(mean, error, 2)
        middle = sorted(found)[len(found) // 2]
        rows.append([name, f"{middle:.0f} ({min(found):.0f}..{max(found):.0f})", f"{ratio:.2f}", reach])
    table = _markdown(["run", "ms a step", "times VDM's", "time to VDM's last figure, of VDM's time"], rows)
    return f"{table}\n\nLoad before it: {measured['load_before']:.1f}."


def _mean(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error (nan for one seed)."""
    n, mean = len(values), sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else math.nan


def _shown(mean: float, error: float | None, digits: int = 3) -> str:
    return f"{mean:.{digits}f}" + ("" if error is None or math.isnan(error) else f" ± {error:.{digits}f}")


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _by_name(results: dict[str, Any], names: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Records of each name in the order of their seeds, of those names that have any."""
    found = {n: sorted((r for r in results.values() if r["name"] == n), key=lambda r: r["seed"]) for n in names}
    return {n: records for n, records in found.items() if records}


def final_table(results: dict[str, Any], names: list[str], reference: str) -> str:
    """Valid bounds on the test images, means over seeds, and the difference to the reference seed by seed."""
    groups = _by_name(results, names)
    base = {r["seed"]: r["test"]["bits_per_dim"]["mean"] for r in _by_name(results, [reference]).get(reference, [])}
    rows = []
    for name, records in groups.items():
        bounds = {r["seed"]: r["test"]["bits_per_dim"]["mean"] for r in records}
        mean, error = _mean(list(bounds.values()))
        images = max(r["test"]["bits_per_dim"]["standard_error"] for r in records)
        shared = [bounds[s] - base[s] for s in bounds if s in base]
        published = [r["test"]["as_published"]["mean"] for r in records if r["test"]["as_published"]]
        key = "valid_latent" if published else "latent"
        price = _mean([r["test"]["terms"][key]["mean"] for r in records])[0]
        use = [r["test"]["latent_use"] for r in records if r["test"]["latent_use"]]
        spread = _mean([u["largest_spread"] for u in use])[0] if use else None
        change = [max(u["denoiser_change"]["mean"]) for u in use if u["denoiser_change"]]
        rows.append(
            [
                name,
                str(len(records)),
                _shown(mean, error),
                f"{images:.3f}",
                "" if name == reference or not shared else _shown(*_mean(shared)),
                _shown(*_mean(published)) if published else "",
                f"{price:.4f}" if use else "",
                "" if spread is None else f"{spread:.3f}",
                f"{100 * _mean(change)[0]:.1f} %" if change else "",
                f"{records[0]['parameters'] / 1000:.0f} k",
            ]
        )
    head = ["run", "seeds", "bound ± seeds", "± images", f"minus {reference}", "paper's figure", "latent",
            "spread of gamma", "denoiser's change", "parameters"]  # fmt: skip
    return _markdown(head, rows)


def curve_table(results: dict[str, Any], names: list[str]) -> str:
    """Validation bits/dim over steps, means over seeds ± their standard error."""
    groups = _by_name(results, names)
    steps = next(iter(groups.values()))[0]["curve"]["step"] if groups else []
    rows = []
    for name, records in groups.items():
        columns = zip(*(r["curve"]["mean"] for r in records), strict=True)
        rows.append([name, *(_shown(*_mean(list(column))) for column in columns)])
    return _markdown(["run", *map(str, steps)], rows)


def _reach(curve: dict[str, Any], goal: float) -> float | None:
    """The step at which a validation figure reaches ``goal``, interpolated between evaluations (the first of them where
    it already has); None where it does not."""
    below = [i for i, value in enumerate(curve["mean"]) if value <= goal]
    if not below:
        return None
    i = below[0]
    if i == 0:
        return curve["step"][0]
    part = (curve["mean"][i - 1] - goal) / (curve["mean"][i - 1] - curve["mean"][i])
    return curve["step"][i - 1] + part * (curve["step"][i] - curve["step"][i - 1])


def _reach_parts(results: dict[str, Any], name: str, reference: str) -> list[float]:
    """The steps that ``name`` takes to the reference's last figure over the reference's steps, seed by seed; empty
    where one does not reach it."""
    groups = _by_name(results, [reference, name])
    goals = {r["seed"]: r["curve"] for r in groups.get(reference, [])}
    pairs = [(r["curve"], goals[r["seed"]]) for r in groups.get(name, []) if r["seed"] in goals]
    steps = [_reach(curve, goal["mean"][-1]) for curve, goal in pairs]
    if None in steps:
        return []
    return [step / goal["step"][-1] for step, (_, goal) in zip(steps, pairs, strict=True) if step is not None]


def reach_table(results: dict[str, Any], names: list[str], reference: str) -> str:
    """Steps until the validation figure reaches the reference's last one of the same seed, interpolated."""
    groups = _by_name(results, [reference, *names])
    rows = []
    for name in names:
        for record in groups.get(name, []):
            same = [r for r in groups.get(reference, []) if r["seed"] == record["seed"]]
            if not same:
                continue
            goal, curve = same[0]["curve"]["mean"][-1], record["curve"]
            step, last = _reach(curve, goal), same[0]["curve"]["step"][-1]
            reached = f"not within {curve['step'][-1]}" if step is None else f"{step:.0f} of {last}"
            rows.append([name, str(record["seed"]), f"{goal:.4f}", f"{curve['mean'][-1]:.4f}", reached])
    return _markdown(["run", "seed", f"{reference}'s last figure", "its own last figure", "steps to reach it"], rows)


def finite_table(results: dict[str, Any], names: list[str]) -> str:
    """The discrete bound against T, test images, seed 0."""
    rows = []
    for name, records in _by_name(results, names).items():
        record = records[0]
        if record["finite"]:
            bounds = [record["finite"][str(t)] for t in STEPS] + [record["test"]["bits_per_dim"]]
            rows.append([name, *(_shown(b["mean"], b["standard_error"]) for b in bounds)])
    return _markdown(["run", *(f"T = {t}" for t in STEPS), "T = ∞"], rows)


def ddpm_table(results: dict[str, Any]) -> str:
    """Every figure of the DDPMs, test images, ± over images."""
    rows = []
    for name, (record, *_) in _by_name(results, [name for name, _ in DDPM]).items():
        found = record["figures"]
        shown = [_shown(**_bits(found[key])) if key in found else "" for key in FIGURES]
        rows.append([name, *shown, f"{record['test']['terms']['reconstruction']['mean']:.4f}"])
    return _markdown(["run", *FIGURES, "decoder's part"], rows)


def fashion_table(results: dict[str, Any]) -> str:
    """Bound and ODE figure on test images, ± over images, with what they took."""
    rows = []
    for name, (record, *_) in _by_name(results, list(FASHION)).items():
        bound, ode = record["test"]["bits_per_dim"], record["figures"][ODE]
        latent = record["test"]["terms"].get("latent", {"mean": 0.0})["mean"]
        shown = [_shown(**_bits(bound)), _shown(**_bits(ode)), f"{latent:.4f}", f"{record['parameters'] / 1000:.0f} k"]
        rows.append([name, *shown, f"{record['curve']['step'][-1]}", f"{record['seconds'] / 60:.0f}"])
    head = [
        "run",
        "bound, 2000 images",
        "ODE estimate, 64 images",
        "latent",
        "parameters",
        "steps",
        "minutes, one thread",
    ]
    return _markdown(head, rows)


def _bits(figure: dict[str, float]) -> dict[str, float]:
    return {"mean": figure["mean"], "error": figure["standard_error"]}


def baseline_table(results: dict[str, Any], ending: str) -> str:
    """The classical references of the same test images."""
    record = next((r for r in results.values() if r["name"].endswith(ending)), None)
    rows = [] if record is None else [
        [b["name"], _shown(b["bits_per_dim"], b["standard_error"]), b["note"]] for b in record["baselines"]
    ]  # fmt: skip
    return _markdown(["reference", "bits/dim", "what it is"], rows)


def draw_curves(results: dict[str, Any], names: list[str], path: Path) -> None:
    """Validation bits/dim over steps, a line a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for colour, (name, records) in enumerate(_by_name(results, names).items()):
        for i, record in enumerate(records):
            curve = record["curve"]
            axes.plot(curve["step"], curve["mean"], color=f"C{colour}", lw=1, label=name if i == 0 else None)
    axes.set(xlabel="step", ylabel="validation bound, bits/dim", ylim=(None, 2.6))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def write_tables() -> None:
    """Replace what stands between the markers of docs/experiments.md by tables of the results."""
    results = read_results()
    digits, photos = [f"{n}-digits" for n in MAIN], [f"{n}-photos32" for n in MAIN]
    ablations = ["vdm-digits", "mulan-digits", *(f"{n}-digits" for n in ABLATIONS)]
    follow_ups = ["vdm-digits", "mulan-digits", *(name for name, _, _ in FOLLOW_UPS)]
    beyond = ["vdm-digits", "mulan-digits", *(name for name, *_ in BEYOND)]
    tables = {
        "digits": final_table(results, digits, "vdm-digits"),
        "digits-baselines": baseline_table(results, "-digits"),
        "digits-steps": curve_table(results, digits),
        "digits-reach": reach_table(results, digits[1:], "vdm-digits"),
        "cost": cost_table(results),
        "digits-finite": finite_table(results, digits),
        "photos32": final_table(results, photos, "vdm-photos32"),
        "photos32-baselines": baseline_table(results, "-photos32"),
        "ablations": final_table(results, ablations, "mulan-digits"),
        "follow-ups": final_table(results, follow_ups, "mulan-digits"),
        "smaller": final_table(results, ["mulan-digits", *(name for name, _ in SMALLER)], "mulan-digits-again"),
        "beyond": final_table(results, beyond, "mulan-digits"),
        "ddpm": ddpm_table(results),
        "fashion": fashion_table(results),
        "fashion-baselines": baseline_table(results, "-fashion"),
    }
    draw_curves(results, digits, PAGE.parent / "images" / "digits-curves.png")
    text = PAGE.read_text()
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        if begin not in text or end not in text:
            raise SystemExit(f"docs/experiments.md lacks the markers {begin} and {end}")
        before, after = text.split(begin)[0], text.split(end)[1]
        text = f"{before}{begin}\n{table}\n{end}{after}"
    PAGE.write_text(text)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("queue", "tables", "list", "cost"))
    parser.add_argument("--at-once", type=int, default=2, help="trainings at once, one thread each")
    parser.add_argument("--only", default="", help="only entries whose name contains this")
    arguments = parser.parse_args()
    queue = [entry for entry in entries() if arguments.only in entry.key]
    if arguments.what == "queue":
        work(queue, arguments.at_once)
    elif arguments.what == "tables":
        write_tables()
    elif arguments.what == "cost":
        measure_cost()
    else:
        done = read_results()
        for entry in queue:
            print(f"{'done' if entry.key in done else '    '}  {entry.key}  {' '.join(entry.overrides)}")


if __name__ == "__main__":
    main()
