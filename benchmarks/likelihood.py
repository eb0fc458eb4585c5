"""The likelihood by ODE against the public way of computing it: same weights, images, noise and probes, in one run.

    python benchmarks/likelihood.py RUN --images 32                  RUN: a trained run
    python benchmarks/likelihood.py RUN --ideas                      what each idea bought
    python benchmarks/likelihood.py RUN --waves                      Adams' error by the number of steps
    python benchmarks/likelihood.py RUN --trace-bias                 Hutchinson's probes against the exact trace
    python benchmarks/likelihood.py RUN --estimator                  the diffusion term's variance by choice of times

The public way (i-DODE's and MuLAN's evaluation, after score_sde) is written down in ``public``: scipy's RK45 over one
float64 vector of the whole batch with one log-density an image, and at every call the schedule from the latent, one
network evaluation and one vector-Jacobian product. Its error norm is the root mean square over that vector.

"error" is the mean over images of the figure less that of a solve with the network and the state in float64, by Adams'
method with 1000 steps at least and tolerances of 1e-6, in bits/dim; beside it its root mean square over the images and
the largest.
"At equal error" takes of each way the cheapest setting whose error stays below 0.001: in the mean, and in the root mean
square, which luck cannot make small. The machine should be idle: the load is printed.
"""

import copy
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nelbo.process import choose_waiting, keep_memory

choose_waiting()  # as the nelbo command does; read once, when torch is loaded

import numpy as np
import torch
import tyro
from scipy.integrate import solve_ivp
from torch import Tensor

from nelbo import checkpoints, likelihood, pixels, times
from nelbo.data import load
from nelbo.draws import Draws
from nelbo.flow import LEAST_STEPS, Flow, log_prior
from nelbo.model import DiffusionModel


@dataclass(frozen=True)
class Case:
    """What is measured."""

    run: tyro.conf.Positional[Path]
    """A trained run, whose test images are used."""
    images: int = 32
    """Images, solved as one batch."""
    tolerances: tuple[float, ...] = (1e-4, 3e-5, 1e-5, 3e-6, 1e-6)
    """rtol = atol of the public way."""
    repeats: int = 3
    """Interleaved repeats; the median counts."""
    threads: int | None = None
    """Threads. By default torch's choice."""
    ideas: bool = False
    """Switch the ideas off one at a time."""
    waves: bool = False
    """The error of Adams' method by the number of equal steps."""
    trace_bias: bool = False
    """Compare Hutchinson's figures with the exact trace's, for K = 1 and more, shared and independent probes."""
    estimator: bool = False
    """The variance of the diffusion term's estimator: uniform, stratified and importance-sampled times."""
    out: Path | None = None
    """A JSON file for all figures."""


@dataclass(frozen=True)
class Problem:
    """What both ways start from: z_0 (B, C, H, W), c and one probe an image."""

    model: DiffusionModel
    z_0: Tensor
    c: Tensor | None
    probes: Tensor


@dataclass(frozen=True)
class Answer:
    """log p(z_0) (B,) in nats, evaluations of the network an image, and seconds in all."""

    log_p: np.ndarray
    evaluations: float
    seconds: float


def prepare(case: Case) -> Problem:
    """The run's model and its first test images, dequantized by truncated normals."""
    model = checkpoints.load_model(case.run, "best", "ema", "cpu").eval()
    images = torch.as_tensor(load(checkpoints.read_run(case.run)["config"]["data"]["source"]).images["test"])
    images = images[: case.images]
    draws = Draws(0, range(len(images)))
    with torch.no_grad():
        latent = None
        if model.latent is not None:
            latent = model.infer(pixels.encode(images, model.levels), model.latent.noise(draws))
        c = None if latent is None else latent.c
        gamma_0, _ = model.curve(c)(torch.zeros(len(images)))
        alpha, sigma = model.path.coefficients(gamma_0)
        noise = draws.uniform("eps_0", model.shape).double()
        z_0 = pixels.TruncatedNormal().draw(images, alpha, sigma, model.levels, noise).z.float()
    probes = 1 - 2 * (draws.uniform("probe", (1, *model.shape)) < 0.5).float()
    return Problem(model, z_0, c, probes)


def public(problem: Problem, tolerance: float) -> Answer:
    """The public way."""
    model, shape, batch = problem.model, problem.z_0.shape, len(problem.z_0)
    begun, size = time.perf_counter(), problem.z_0.numel()

    def field(t: float, state: np.ndarray) -> np.ndarray:
        z = torch.from_numpy(state[:size].reshape(shape)).float().requires_grad_()
        with torch.enable_grad():
            gamma, rate = model.curve(problem.c)(torch.full((batch,), t))  # the schedule's network, at every call
            x_hat, eps_hat = model.predict(z, gamma, problem.c)
            d_alpha, d_sigma = model.path.derivatives(gamma)
            drift = rate * (d_alpha * x_hat + d_sigma * eps_hat)
            (vjp,) = torch.autograd.grad(drift, z, problem.probes[:, 0])
        divergence = (vjp * problem.probes[:, 0]).flatten(1).sum(1)
        return np.concatenate([drift.detach().numpy().ravel(), divergence.numpy()]).astype(np.float64)

    start = np.concatenate([problem.z_0.numpy().ravel(), np.zeros(batch)]).astype(np.float64)
    solution = solve_ivp(field, (0.0, 1.0), start, rtol=tolerance, atol=tolerance, method="RK45")
    assert solution.success, solution.message
    end = solution.y[:, -1]
    log_p = log_prior(torch.from_numpy(end[:size].reshape(shape)), model.prior_scale).numpy() + end[size:]
    return Answer(log_p, float(solution.nfev), time.perf_counter() - begun)


@dataclass(frozen=True)
class Setting:
    """A solver of nelbo's; by default that of ``nelbo evaluate``."""

    method: str = "adams4"
    tolerance: float = 1e-3
    least_steps: int | None = None

    def __str__(self) -> str:
        least = self.least_steps or LEAST_STEPS.get(self.method)
        return f"{self.method}, {self.tolerance:g}" + (f", {least} steps at least" if least else "")


WAVES = (80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 256, 320, 448)
SETTINGS = (
    Setting(least_steps=112), Setting(), Setting(least_steps=448), Setting(tolerance=1e-4, least_steps=1),
    Setting("bosh3", 1e-3), Setting("bosh3", 3e-4), Setting("bosh3", 1e-4), Setting("dopri5", 1e-4),
    Setting("dopri5", 1e-5),
)  # fmt: skip


def ours(problem: Problem, setting: Setting, flow: type[Flow] = Flow) -> Answer:
    """nelbo's way."""
    begun = time.perf_counter()
    model = problem.model
    field = flow(model, problem.c, probes=problem.probes.to(problem.z_0))
    end = field.transport(
        problem.z_0, 0.0, 1.0, divergence=True, rtol=setting.tolerance, atol=setting.tolerance, method=setting.method,
        least_steps=setting.least_steps, max_steps=10_000,
    )  # fmt: skip
    assert end.solution.success and end.divergence is not None, end.solution.advice
    log_p = (log_prior(end.z, model.prior_scale) + end.divergence).numpy()
    return Answer(log_p, float(end.solution.evaluations.double().mean()), time.perf_counter() - begun)


def exact(problem: Problem) -> np.ndarray:
    """Everything in float64 and tight: what the errors are measured against."""
    model = copy.deepcopy(problem.model).double()
    c = None if problem.c is None else problem.c.double()
    return ours(
        Problem(model, problem.z_0.double(), c, problem.probes.double()), Setting(tolerance=1e-6, least_steps=1000)
    ).log_p


def table(head: list[str], rows: list[list[str]]) -> str:
    """Aligned Markdown."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(head), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)])


def compare(case: Case, ways: dict[str, Callable[[], Answer]], problem: Problem, first: str) -> list[dict[str, Any]]:
    """Time every way in turn, ``repeats`` times; a record each, with seconds relative to ``first``."""
    truth = exact(problem)
    answers: dict[str, list[Answer]] = {name: [] for name in ways}
    for _ in range(case.repeats):
        for name, way in ways.items():
            answers[name].append(way())
    records = []
    for name, found in answers.items():
        error = pixels.bits_per_dim(truth - found[0].log_p, problem.model.dimensions)
        seconds = [a.seconds for a in found]
        ratios = [a.seconds / b.seconds for a, b in zip(answers[first], found, strict=True)]
        records.append(
            {
                "way": name,
                "evaluations": found[0].evaluations,
                "seconds_per_image": statistics.median(seconds) / len(truth),
                "spread": [min(seconds) / len(truth), max(seconds) / len(truth)],
                "speed_up": [statistics.median(ratios), min(ratios), max(ratios)],
                "error": float(error.mean()),
                "rms_error": float(np.sqrt(np.mean(error**2))),
                "largest_error": float(np.abs(error).max()),
            }
        )
    head = ["", "evaluations", "seconds an image", f"times as fast as {first}", "error, bits/dim", "rms", "largest"]
    rows = [
        [
            r["way"],
            f"{r['evaluations']:.1f}",
            f"{r['seconds_per_image']:.3f} ({r['spread'][0]:.3f}..{r['spread'][1]:.3f})",
            f"{r['speed_up'][0]:.2f} ({r['speed_up'][1]:.2f}..{r['speed_up'][2]:.2f})",
            f"{r['error']:+.5f}",
            f"{r['rms_error']:.5f}",
            f"{r['largest_error']:.5f}",
        ]
        for r in records
    ]
    print(table(head, rows))
    return records


def equal_error(records: list[dict[str, Any]], bound: float = 1e-3) -> list[dict[str, Any]]:
    """The cheapest public and the cheapest setting of nelbo's with an error below the bound, and their ratios."""
    found, rows = [], []
    for kind in ("error", "rms_error"):
        good = [r for r in records if abs(r[kind]) < bound]
        ways = [[r for r in good if r["way"].startswith(who)] for who in ("public", "nelbo")]
        if not all(ways):
            rows.append([kind, "none below" if not ways[0] else "", "none below" if not ways[1] else "", "", ""])
            continue
        public, own = (min(w, key=lambda r: r["seconds_per_image"]) for w in ways)
        ratios = [public[name] / own[name] for name in ("seconds_per_image", "evaluations")]
        found.append({"error": kind, "public": public["way"], "nelbo": own["way"], "seconds": ratios[0]})
        rows.append([kind.replace("_", " "), public["way"], own["way"], f"{ratios[0]:.2f}", f"{ratios[1]:.2f}"])
    print("\n" + table([f"below {bound:g}", "public", "nelbo", "times fewer seconds", "times fewer evaluations"], rows))
    return found


class EveryStage(Flow):
    """Without the quadrature's saving: the trace at every stage."""

    def field(self, t: Tensor, w: Tensor, rows: Tensor, integrand: bool) -> tuple[Tensor, Tensor | None]:
        return super().field(t, w, rows, True)


class PlainState(Flow):
    """Without the semi-linear form: the state is z."""

    def scale(self, gamma: Tensor) -> Tensor:
        return torch.ones_like(gamma)

    def field(self, t: Tensor, w: Tensor, rows: Tensor, integrand: bool) -> tuple[Tensor, Tensor | None]:
        speed, trace = super().field(t, w, rows, integrand)
        gamma, rate = self.at_work[0](t.to(w.dtype))
        model = self.model
        alpha, sigma = model.path.coefficients(gamma)
        d_alpha, d_sigma = model.path.derivatives(gamma)
        a, b = model.parameterization.pair(model.path, alpha, sigma)
        linear = rate * (d_alpha * b - d_sigma * a) / (alpha * b - sigma * a)
        if trace is not None:
            trace = trace + linear.double().expand_as(w).flatten(1).sum(1)
        return speed + linear * w, trace


class PlainUnit(Flow):
    """Tolerances in units of the pixels, the same at every time."""

    def noise(self, t: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones(1), super().noise(t, rows)[1]


class FreshSchedule(Flow):
    """The schedule's network at every call."""

    def select(self, rows: Tensor) -> None:
        self.rows = None
        super().select(rows)


def one_by_one(problem: Problem) -> Answer:
    """Every image a batch of its own."""
    begun, found = time.perf_counter(), []
    for i in range(len(problem.z_0)):
        c = None if problem.c is None else problem.c[i : i + 1]
        part = Problem(problem.model, problem.z_0[i : i + 1], c, problem.probes[i : i + 1])
        found.append(ours(part, Setting()))
    log_p = np.concatenate([a.log_p for a in found])
    return Answer(log_p, float(np.mean([a.evaluations for a in found])), time.perf_counter() - begun)


def machine() -> str:
    """One line."""
    name = platform.processor() or platform.machine()
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        name = next((x.partition(":")[2].strip() for x in cpu.read_text().splitlines() if "model name" in x), name)
    load = os.getloadavg()[0]
    return f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()}, load {load:.2f}"


def main(case: Case) -> None:
    """Measure and print."""
    keep_memory()  # as the nelbo command does
    if case.threads:
        torch.set_num_threads(case.threads)
    torch.set_grad_enabled(False)
    problem = prepare(case)
    record: dict[str, Any] = {"case": asdict(case), "machine": machine()}
    preset = checkpoints.read_run(case.run)["preset"]
    print(f"{preset}, {len(problem.z_0)} images of {problem.model.shape}; {machine()}\n")
    if case.ideas:
        whole, pair = Setting(), Setting("dopri5", 1e-5)
        steps, third = Setting(tolerance=1e-4, least_steps=1), Setting("bosh3", 3e-4)
        ways = {
            f"all: {whole}": lambda: ours(problem, whole),
            f"the tolerance's own steps: {steps}": lambda: ours(problem, steps),
            f"a pair instead: {third}": lambda: ours(problem, third),
            f"a pair instead: {pair}": lambda: ours(problem, pair),
            f"{pair}, the trace at every stage": lambda: ours(problem, pair, EveryStage),
            "state z instead of z/m": lambda: ours(problem, whole, PlainState),
            "errors beside 1, not beside the noise": lambda: ours(problem, whole, PlainUnit),
            "schedule's network at every call": lambda: ours(problem, whole, FreshSchedule),
            "one image at a time": lambda: one_by_one(problem),
        }
        record["ideas"] = compare(case, ways, problem, f"all: {whole}")
    elif case.waves:
        ways = {str(n): lambda n=n: ours(problem, Setting(tolerance=1e-2, least_steps=n)) for n in WAVES}
        record["waves"] = compare(case, ways, problem, "224")
    elif case.trace_bias:
        record["trace_bias"] = trace_bias(case)
    elif case.estimator:
        record["estimator"] = estimator(case)
    else:
        ways = {}
        for tolerance in case.tolerances:
            ways[f"public, {tolerance:g}"] = lambda tolerance=tolerance: public(problem, tolerance)
        for setting in SETTINGS:
            ways[f"nelbo, {setting}"] = lambda setting=setting: ours(problem, setting)
        usual = min(case.tolerances, key=lambda tolerance: abs(math.log(tolerance / 1e-5)))
        record["comparison"] = compare(case, ways, problem, f"public, {usual:g}")
        record["equal_error"] = equal_error(record["comparison"])
    print(f"\nload at the end {os.getloadavg()[0]:.2f}")
    if case.out:
        case.out.write_text(json.dumps(record, indent=1, default=str) + "\n")


def trace_bias(case: Case) -> list[dict[str, Any]]:
    """K = 1, 5, 20: the exact trace, shared probes and independent ones, on the same noise."""
    model = checkpoints.load_model(case.run, "best", "ema", "cpu").eval()
    images = load(checkpoints.read_run(case.run)["config"]["data"]["source"]).images["test"][: case.images]
    most, records = 20, []
    # Half the steps: a probe's deviation is a hundred times what they cost.
    options: dict[str, Any] = {"replicates": 1, "samples": most, "least_steps": LEAST_STEPS["adams4"] // 2}
    weights = {}
    for name in ("exact", "rademacher"):
        found = likelihood.ode_table(len(images), 1, most)
        likelihood.ode(model, images, trace=name, table=found, **options)
        weights[name] = found["prior"] + found["divergence"] - found["log_q"] + found["log_weight"]
    # Independent probes: one sample in each of 20 replicates has a probe of its own, and the same noise.
    apart = likelihood.ode_table(len(images), most, 1)
    likelihood.ode(model, images, trace="rademacher", table=apart, **(options | {"replicates": most, "samples": 1}))
    weights["independent"] = (apart["prior"] + apart["divergence"] - apart["log_q"] + apart["log_weight"]).reshape(
        len(images), 1, most
    )
    spread = float((weights["independent"] - weights["exact"]).std(2).mean())
    print(f"standard deviation of a probe: {spread:.3f} nats an image\n")
    rows: list[list[str]] = []
    unbiased: dict[str, np.ndarray] = {}
    for k in (1, 5, most):
        figures = {}
        for name, w in weights.items():
            groups = w.reshape(len(images), -1, k)
            figure = math.log(k) - np.logaddexp.reduce(groups, 2)
            figures[name] = np.asarray(pixels.bits_per_dim(figure.mean(1), model.dimensions))
        row = [f"K = {k}", f"{figures['exact'].mean():.4f}"]
        for name in ("rademacher", "independent"):
            gap = figures[name] - figures["exact"]
            unbiased.setdefault(name, gap)  # K = 1: what is left of it is the probes' luck, which all K share
            for values in (gap, gap - unbiased[name]):
                row.append(f"{values.mean():+.4f} ± {values.std(ddof=1) / math.sqrt(len(gap)):.4f}")
        rows.append(row)
        records.append({"samples": k, **{n: f.tolist() for n, f in figures.items()}})
    head = [
        "",
        "exact trace, bits/dim",
        "shared probe less exact",
        "and less K = 1's",
        "independent less exact",
        "and less K = 1's",
    ]
    print(table(head, rows))
    return [{"probe_deviation_nats": spread}, *records]


def estimator(case: Case, draws: int = 64) -> list[dict[str, Any]]:
    """The diffusion term of a batch from one time an image: its mean and its deviation over draws of all randomness."""
    model = checkpoints.load_model(case.run, "best", "ema", "cpu").eval()
    images = torch.as_tensor(load(checkpoints.read_run(case.run)["config"]["data"]["source"]).images["test"])
    images = images[: case.images]
    n, records, rows = len(images), [], []
    places = torch.arange(n)
    for name in ("uniform", "stratified", "uniform, by importance", "stratified, by importance"):
        single, batch = [], []
        for draw in range(draws):
            keyed = Draws(0, range(n), draw)
            u = keyed.uniform("time")
            t = times.stratified(u[:1], places, n) if name.startswith("stratified") else u
            terms = likelihood.draw_terms(model, images, t, keyed, importance="importance" in name)
            bits = pixels.bits_per_dim(terms.diffusion.double().numpy(), model.dimensions)
            single.append(bits)
            batch.append(bits.mean())
        of_one = float(np.sqrt(np.stack(single).var(0, ddof=1).mean()))
        of_batch = float(np.std(batch, ddof=1))
        records.append({"times": name, "mean": float(np.mean(batch)), "one": of_one, "batch": of_batch})
        error = of_batch / math.sqrt(draws)
        rows.append([name, f"{np.mean(batch):.4f} ± {error:.4f}", f"{of_one:.4f}", f"{of_batch:.4f}"])
    print(table(["times", "diffusion term, bits/dim", "deviation, one image", f"deviation, mean of {n}"], rows))
    return records


if __name__ == "__main__":
    main(tyro.cli(Case))
